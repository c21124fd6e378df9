"""A checkpoint of any kind, opened as far as that can be done: what is wrong is noted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxquant.checkpoint_files import CheckpointFiles, LazyTensor, TensorHeader, read_headers
from fxquant.checkpoint_sources import CheckpointSource, open_source
from fxquant.checkpoints.stored import StoredWeight
from fxquant.gguf import GgufFile, GgufTensor, open_gguf
from fxquant.inspection.data import Notes
from fxquant.inspection.directories import CONFIG, read_directory
from fxquant.inspection.gguf_files import gguf_path, read_gguf
from fxquant.inspection.matrices import find_matrices, is_below
from fxquant.model_files import is_model_directory
from fxquant.model_tensors import weight_files
from fxquant.own_source import own_source
from fxquant.pretrained import check_size, load_config, model_class, skeleton

OWN, GGUF = "fxquant", "gguf"
Header = TensorHeader | GgufTensor


@dataclass(frozen=True)
class Opened:
    """What could be opened."""

    path: Path
    """The directory, or the GGUF file."""
    format: str
    files: CheckpointFiles | GgufFile | None
    """None where not even the headers could be read."""
    config: Any = None
    """Of transformers; None where there is none."""
    model: nn.Module | None = None
    """Without weights; None where none can be built."""
    weights: list[StoredWeight] = field(default_factory=list)
    plain: Mapping[str, LazyTensor] = field(default_factory=dict)
    """All other tensors, by their names in the files; of GGUF, by those of the model."""
    holders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of GGUF: which tensors of the file make up each of `plain`."""
    damaged: frozenset[str] = frozenset()
    """Modules whose matrices cannot be told."""
    understood: bool = True
    """Whether it is known which tensors are the model's; False: there is no more to find than what the headers say."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor, by name."""
        return {} if self.files is None else self.files.headers

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """A tensor of the files.

        Raises:
            FileError: there is none, or it cannot be read.
        """
        assert self.files is not None
        return self.files.tensor(name, index)


def open_checked(path: Path, notes: Notes) -> Opened:
    """Open a checkpoint; noted: all that is wrong with its files, its config, and the names and shapes of its tensors.

    Raises:
        FileError: a directory with several GGUF files.
    """
    if is_model_directory(path):
        return _open_own(path, notes)
    gguf = gguf_path(path)
    return _open_directory(path, notes) if gguf is None else _open_gguf(gguf, notes)


def _open_directory(path: Path, notes: Notes) -> Opened:
    files = read_directory(path, notes)
    config: Any = None
    if not any(one.place == CONFIG for one in notes.problems):
        config = copy.deepcopy(notes.tried(lambda: load_config(path), CONFIG))
    found = find_matrices(files, notes)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    claimed = {piece.name for weight in found.weights for piece in weight.pieces.values()}
    plain = [name for name in files.headers if name not in claimed and not is_below(name, found.damaged)]
    return Opened(
        path,
        found.format,
        files,
        config,
        _model(config, path, files.headers.values(), notes),
        found.weights,
        {name: files.lazy(name) for name in sorted(plain)},
        damaged=found.damaged,
        understood=found.understood,
    )


def _open_gguf(path: Path, notes: Notes) -> Opened:
    file: GgufFile | None = notes.tried(lambda: open_gguf(path))
    if file is None:
        return Opened(path, GGUF, None, understood=False)
    source: CheckpointSource | None = notes.tried(lambda: open_source(path))
    if source is None:
        return Opened(path, GGUF, file, understood=False)
    model = _model(source.config, path, file.headers.values(), notes)
    if model is None:
        return Opened(path, GGUF, file, source.config, understood=False)
    found = read_gguf(file, model, notes)
    return Opened(
        path,
        GGUF,
        file,
        source.config,
        model,
        found.weights,
        {name: LazyTensor(one.shape, source.config.dtype, one.read) for name, one in found.plain.items()},
        {match.name: match.tensors for match in found.matches},
        understood=found.understood,
    )


def _open_own(path: Path, notes: Notes) -> Opened:
    before = len(notes.problems)
    files = _own_files(path, notes)
    # what is wrong with the files has been noted, and is not to be told twice
    own = notes if len(notes.problems) == before else Notes()
    source: CheckpointSource | None = own.tried(lambda: own_source(path))
    if source is None:
        return Opened(path, OWN, files, understood=False)
    model = _model(source.config, path, files.headers.values(), notes)
    if model is None:
        return Opened(path, OWN, files, source.config, understood=False)
    weights = source.weights(model)
    claimed = {piece.name for weight in weights for piece in weight.pieces.values()}
    plain = notes.tried(lambda: source.plain(model, claimed))
    understood = plain is not None
    return Opened(path, OWN, files, source.config, model, weights, plain or {}, understood=understood)


def _own_files(path: Path, notes: Notes) -> CheckpointFiles:
    headers: dict[str, TensorHeader] = {}
    for file in notes.tried(lambda: weight_files(path)) or ():
        with notes.noted(file.name):
            headers |= dict(read_headers(file, {}))
    return CheckpointFiles(path, {}, headers, {})


def _model(config: Any, path: Path, headers: Iterable[Header], notes: Notes) -> nn.Module | None:
    """The model without weights; None where the config describes none, or one that the files cannot hold."""
    if config is None:
        return None
    found = list(headers)
    model: nn.Module | None = notes.tried(lambda: skeleton(model_class(config), config, tensors=len(found)))
    if model is not None and found:
        before = len(notes.problems)
        with notes.noted():
            check_size(model, sum(header.nbytes for header in found), str(path))
        if len(notes.problems) > before:
            return None
    return model
