"""Quantized models as files: a directory with plain tensors in safetensors and everything else in JSON.

    config.json            transformers' config, with `quantization_config: {"quant_method": "fxquant"}`
    fxquant.json           format version, model class, scheme and dtype of every quantized linear, shared tensors
    fxquant.safetensors    the state_dict: planes, biases and all other parameters and buffers
    generation_config.json, tokenizer files

The weights are not called `model.safetensors`: transformers would load that without fxquant, fill the weights that it
does not find with random numbers, and warn. So it says that there are no weights, which is true for it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import FileError, ModelError, SchemeError, nearest
from fxquant.linears import find_linears
from fxquant.model_index import FLOATS, FORMAT, INDEX, Index, index_of, read_index
from fxquant.modules import QLinear
from fxquant.pretrained import load_config, model_class, skeleton

WEIGHTS = "fxquant.safetensors"
_STORED: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""dtypes by the names that safetensors headers use."""


def is_model_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `write_model` made this directory, as far as its file names tell."""
    return all((Path(path) / name).is_file() for name in (INDEX, WEIGHTS, "config.json"))


def check_target(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a place where `write_model` could not write; to be called before hours of work.

    Raises:
        FileError: it cannot be created, or holds something that must not be replaced.
    """
    target = Path(path)
    parent = target.absolute().parent
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileError(f"{target} exists and is not a directory: give another path")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise FileError(f"{target} is not empty\n  give another path, or --force to replace a model that is there")
        if not is_model_directory(target):
            raise FileError(f"{target} holds something else than a model that fxquant wrote: it is not replaced")
    if not parent.is_dir():
        raise FileError(f"cannot write {target}: there is no directory {parent}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise FileError(f"cannot write {target}: {parent}: {error.strerror or error}") from None


def write_model(
    model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None, *, recipe: str = "", force: bool = False
) -> None:
    """Write a quantized model of transformers as a directory, which appears complete or not at all.

    Args:
        model: with at least one `QLinear`; its weights may be on any device but meta.
        path: the directory; must not exist, or be empty.
        tokenizer: its files are written too.
        recipe: for people: what the model was quantized by.
        force: replace the directory where it holds a model that fxquant wrote.

    Raises:
        FileError: the place cannot be written.
        ModelError: the model is not quantized, is no class of transformers, or has weights without values.
    """
    index = index_of(model, recipe)
    tensors, shared = _unique_tensors(model)
    check_target(path, force=force)
    target = Path(path).absolute()
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_files(made, model, {**index, "shared": shared}, tensors, tokenizer)
        made.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(made, target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_model(path: str | os.PathLike[str]) -> nn.Module:
    """A model that `write_model` wrote: the same tensors bit for bit, on the CPU, in eval mode.

    Nothing is unpickled and no code of the directory runs; every name, shape and dtype is checked before a tensor is
    read.

    Raises:
        FileError: the directory is not what it should be; says where.
    """
    index = read_index(path)
    model = build(path, index)
    _load(model, Path(path) / WEIGHTS, index)
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise FileError(f"{path} cannot be read: {', '.join(empty[:3])} of this {index.model} is in no file")
    return model


def build(path: str | os.PathLike[str], index: Index) -> nn.Module:
    """The model of the directory without its weights: `QLinear`s in place, everything on the meta device.

    Raises:
        FileError: config and index contradict each other, or a linear cannot hold its scheme.
    """
    config = load_config(path)
    config.architectures = [index.model]
    # In memory a model is the same whether quantized here or read: its config says nothing of quantization.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton(model_class(config), config)
    sites = {name: site for site in find_linears(model) for name in site.aliases}
    made: dict[str, QLinear] = {}
    for name, (scheme, dtype) in index.linears.items():
        site = sites.get(name)
        if site is None or site.obstacle is not None:
            reason = site.obstacle if site else f"the model has no linear of this name{nearest(name, sites)}"
            raise FileError(f"{Path(path) / INDEX}: {name} cannot be {scheme}: {reason}")
        try:
            new = QLinear.replacing(site.module, scheme, transposed=site.transposed)
        except SchemeError as error:
            raise FileError(f"{Path(path) / INDEX}: {name}: {error}") from None
        new.dtype = dtype
        made |= dict.fromkeys(site.aliases, new)
    for name, module in made.items():
        model.set_submodule(name, module)
    return model


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state_dict on the CPU, each once, and the second names of those that have one."""
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} of this {type(model).__name__} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_meta:
            raise ModelError(f"{name} has no values: it is on the meta device")
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        plain = tensor.detach().cpu().contiguous()
        # A view of a larger storage would be refused by safetensors as sharing memory.
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        tensors[name] = plain if whole else plain.clone()
    return tensors, shared


def _write_files(
    made: Path, model: nn.Module, index: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Any
) -> None:
    from safetensors.torch import save_file

    whole: Any = model
    save_file(dict(tensors), made / WEIGHTS, metadata={"format": "pt"})
    whole.config.save_pretrained(made)
    if getattr(whole, "generation_config", None) is not None:
        whole.generation_config.save_pretrained(made)
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [index["model"]], "quantization_config": {"quant_method": "fxquant", "format": FORMAT}}
    for name, data in {"config.json": config, INDEX: index}.items():
        (made / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _move_into_place(made: Path, target: Path) -> None:
    if not target.exists():
        os.replace(made, target)
        return
    old = made.with_name(f"{made.name}.old")
    os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old)


def _load(model: nn.Module, file: Path, index: Index) -> None:
    """Put the tensors of the file into the model, after a check of all of them."""
    from safetensors import SafetensorError, safe_open

    wanted = model.state_dict(keep_vars=True)
    try:
        with safe_open(file, framework="pt") as stored:
            _check_header(file, stored, model, wanted, index)
            loaded: dict[str, Tensor] = {}
            for name in stored.keys():  # noqa: SIM118  (not a mapping)
                old = wanted[name]
                tensor = stored.get_tensor(name)
                is_parameter = isinstance(old, nn.Parameter)
                loaded[name] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {file}: {error}") from None
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        place: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        place[leaf] = loaded[index.shared.get(name, name)]


def _check_header(file: Path, stored: Any, model: nn.Module, wanted: Mapping[str, Tensor], index: Index) -> None:
    names = set(stored.keys())
    expected = set(wanted) - set(index.shared)
    strange = sorted(set(index.shared) - set(wanted)) + sorted(t for t in index.shared.values() if t not in names)
    for fault, found in {
        "lacks tensors of the model": sorted(expected - names),
        "holds tensors that the model does not have": sorted(names - expected),
        "and its index disagree on shared tensors": strange,
    }.items():
        if found:
            raise FileError(f"{file} {fault}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''} ({len(found)})")
    planes = {
        f"{name}.{plane}"
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, QLinear)
        for plane in m.plane_names
    }
    for name, old in wanted.items():
        header = stored.get_slice(index.shared.get(name, name))
        shape, dtype = tuple(header.get_shape()), _STORED.get(header.get_dtype())
        # Planes are exact. The dtype of other floats is the file's to say: a config has one for all of them.
        both_floats = name not in planes and {dtype, old.dtype} <= set(FLOATS.values())
        if shape != tuple(old.shape) or not (dtype == old.dtype or both_floats):
            raise FileError(
                f"{file}: {name} is {header.get_dtype()} {list(shape)}; the model needs {old.dtype} {list(old.shape)}"
            )
