"""What is written of a checkpoint in each format: units of tensors, the files they go to, and the texts beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Unit, Writer
from fxquant.errors import FileError, nearest
from fxquant.gguf import gguf_fit, gguf_header, gguf_metadata, gguf_tensors
from fxquant.model_files import config_of, write_texts
from fxquant.model_tensors import WEIGHTS
from fxquant.own_writer import OwnFormat
from fxquant.pretrained import load_generation_config
from fxquant.scheme import PlaneSpec
from fxquant.tensor_files import FilePlan, Place, plan_safetensors
from fxquant.transformers_weights import Names
from fxquant.writers import WRITERS

OWN = "fxquant"
GGUF = "gguf"
_ALIGNMENT = 32
"""Of tensors in a GGUF file that does not say another."""
FORMATS = (OWN, *WRITERS, GGUF)
"""What `convert` writes."""
_TEXTS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "generation_config.json", "*processor_config.json"),
)
"""Files of a checkpoint that have nothing to do with its weights."""


@dataclass(frozen=True)
class Target:
    """A checkpoint that is to be written."""

    units: tuple[Unit, ...]
    plan: FilePlan
    write_texts: Callable[[Path], None]
    """Puts everything but the tensors into a directory."""
    model: nn.Module | None = None
    """The model that the files hold, on the meta device, where it is fxquant's own format."""
    notes: tuple[str, ...] = ()
    """What programs that read the files do otherwise than the model."""


def check_format(to: str) -> None:
    """Refuse a format that is none.

    Raises:
        FileError: there is no such.
    """
    if to not in FORMATS:
        raise FileError(f"there is no format {to!r} to write{nearest(to, FORMATS)}\n  there are: {', '.join(FORMATS)}")


def fits(to: str, matrices: Mapping[str, Matrix], model_type: str) -> Mapping[str, Fit]:
    """In which scheme a format holds each matrix of a model of a kind, as transformers calls it."""
    if to == OWN:
        return {name: Fit(matrix.scheme) for name, matrix in matrices.items()}
    return gguf_fit(matrices, model_type) if to == GGUF else WRITERS[to].fit(matrices)


def target(to: str, contents: Contents, *, file: str, recipe: str, shard_size: int, tokenizer: Any) -> Target:
    """What is to be written.

    Args:
        to: a format.
        contents: with matrices in the schemes that `fits` gave.
        file: name of a GGUF file.
        recipe: for people: what the matrices were quantized by.
        shard_size: bytes from which on tensors are parted into several files.
        tokenizer: of transformers; None: there is none.

    Raises:
        FileError: the format has no place for something, or the contents do not go with their model.
    """
    if to == OWN:
        return _own(contents, recipe, shard_size, tokenizer)
    if to == GGUF:
        return _gguf(contents, file)
    return _directory(contents, WRITERS[to], shard_size, tokenizer)


def _own(contents: Contents, recipe: str, shard_size: int, tokenizer: Any) -> Target:
    own = OwnFormat(contents, recipe)
    units = tuple(own.units())
    order = {name: i for i, name in enumerate(own.model.state_dict(keep_vars=True))}
    specs = dict(sorted(_specs(units).items(), key=lambda item: order[item[0]]))
    plan = plan_safetensors(specs, WEIGHTS.removesuffix(".safetensors"), shard_size)
    folder = contents.path if contents.path.is_dir() else contents.path.parent
    texts = partial(_own_texts, own, load_generation_config(folder), tokenizer)
    return Target(units, plan, texts, own.model)


def _own_texts(own: OwnFormat, generation_config: Any, tokenizer: Any, folder: Path) -> None:
    model: Any = own.model
    if generation_config is not None:
        model.generation_config = generation_config
    write_texts(folder, model, config_of(model), own.index, tokenizer)
    _copy_texts(own.contents.path, folder)


def _directory(contents: Contents, writer: Writer, shard_size: int, tokenizer: Any) -> Target:
    units = tuple(writer.units(contents))
    plan = plan_safetensors(_specs(units), "model", shard_size)
    return Target(units, plan, partial(_directory_texts, contents, writer.config(contents), tokenizer))


def _directory_texts(contents: Contents, quantization: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    contents.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [type(contents.model).__name__], "quantization_config": dict(quantization)}
    ties = getattr(contents.model, "all_tied_weights_keys", {})
    if any(f"{matrix.own}.weight" in ties for matrix in contents.matrices.values()):
        config["tie_word_embeddings"] = False  # what is quantized is a tensor of its own
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not contents.path.is_dir() and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _copy_texts(contents.path, folder)


def _copy_texts(source: Path, folder: Path) -> None:
    """Tokenizers, processors and templates as they are, where they were not written already."""
    for pattern in _TEXTS if source.is_dir() else ():
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _gguf(contents: Contents, file: str) -> Target:
    found = gguf_tensors(contents, _own_names(contents))
    said = gguf_metadata(contents.config, contents.path, found.specs, Path(file).stem)
    header, places = gguf_header(said.metadata, said.kinds, found.specs)
    end = max((offset + nbytes for offset, nbytes in places.values()), default=len(header))
    size = end + (len(header) - end) % _ALIGNMENT
    plan = FilePlan({file: header}, {file: size}, {name: Place(file, *place) for name, place in places.items()})
    return Target(tuple(found.units), plan, lambda folder: None, notes=said.notes)


def _own_names(contents: Contents) -> dict[str, str]:
    """What the model calls the plain tensors."""
    names, keys = Names(contents.model), contents.model.state_dict(keep_vars=True)
    found = {}
    for name in contents.plain:
        own = names.of_matrix(name.removesuffix(".weight")) if name.endswith(".weight") else None
        key = names.renamed(name)[0]
        found[name] = f"{own}.weight" if own is not None else key if key in keys else name
    return found


def _specs(units: Iterable[Unit]) -> dict[str, PlaneSpec]:
    return {name: spec for unit in units for name, spec in unit.tensors.items()}
