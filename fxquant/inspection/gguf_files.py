"""GGUF files of which some tensors are not those of the model: the others, and what is wrong with these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import FileError, FxquantError
from fxquant.gguf import GgufFile, PlainTensor, gguf_plain, gguf_weights
from fxquant.gguf.names import SCALES, Match, match_names, written_names
from fxquant.inspection.data import Notes

_HEAD = "lm_head.weight"
_SETTINGS = ("rope_freqs.", "rope_factors_")
"""Beginnings of names of tensors that configs of transformers have as settings."""
_GATE, _UP, _BOTH = "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class GgufContents:
    """What a file holds of a model."""

    matches: tuple[Match, ...]
    weights: list[StoredWeight]
    plain: dict[str, PlainTensor]
    """By the names of the model's parameters."""
    understood: bool = True
    """Whether it is known which tensor is which of the model."""


def gguf_path(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the first in a directory without a model in safetensors.

    Raises:
        FileError: the directory holds several models.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("model*.safetensors*")) else []
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        names = ", ".join(file.name for file in files[:5])
        raise FileError(f"{path} holds {len(files)} GGUF files: name one of them\n  {names}")
    return files[0] if files else None


def read_gguf(file: GgufFile, model: nn.Module, notes: Notes) -> GgufContents:
    """Matrices and plain tensors; noted: tensors that are missing, that the model does not have, or of other shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        matches = match_names(file, shapes)
    except FxquantError as error:
        before = len(notes.problems)
        matches = _matches(file, shapes, notes)
        if len(notes.problems) == before or not matches:
            notes.problem("", error)
        if not matches:
            return GgufContents((), [], {}, understood=False)
    else:
        try:
            return GgufContents(tuple(matches), gguf_weights(file, shapes), gguf_plain(file, shapes))
        except FxquantError:
            pass  # of which of them is to be found
    return _one_by_one(file, shapes, matches, notes)


def _matches(file: GgufFile, shapes: Shapes, notes: Notes) -> list[Match]:
    """Parameters and tensors that go together; noted: those that do not."""
    found: list[Match] = []
    try:
        names = written_names(file.architecture, shapes)
    except FxquantError:
        return found
    for name, first in names.items():
        tensors = next((way for way in _ways(first) if all(t in file.headers for t in way)), None)
        if tensors is not None:
            found.append(Match(name, tensors))
        elif name != _HEAD or "output.weight" in file.headers:
            notes.problem(name, f"the model has it, and the file does not: {' or '.join(first)} is missing")
    used = {tensor for match in found for tensor in match.tensors}
    used |= {tensor.removesuffix(".weight") + scale for tensor in used for scale in SCALES}
    for name in file.headers.keys() - used:
        if not name.startswith(_SETTINGS):
            notes.problem(name, "the file has it, and the model does not")
    return found


def _ways(first: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What files may call a parameter, by the first of these: gate and up of experts are one tensor, or two."""
    yield first
    if _GATE in first[0]:
        yield (first[0].replace(_GATE, _BOTH),)
    elif _BOTH in first[0]:
        yield first[0].replace(_BOTH, _GATE), first[0].replace(_BOTH, _UP)


def _one_by_one(file: GgufFile, shapes: Shapes, matches: Iterable[Match], notes: Notes) -> GgufContents:
    """As a whole, but parameter by parameter."""
    weights: list[StoredWeight] = []
    plain: dict[str, PlainTensor] = {}
    for match in matches:
        names = {t.removesuffix(".weight") + scale for t in match.tensors for scale in SCALES} | set(match.tensors)
        part = replace(file, headers={name: header for name, header in file.headers.items() if name in names})
        shape = {match.name: shapes[match.name]}
        with notes.noted(match.name):
            found = gguf_weights(part, shape)
            plain |= gguf_plain(part, shape)
            weights += found
    return GgufContents(tuple(matches), weights, plain)
