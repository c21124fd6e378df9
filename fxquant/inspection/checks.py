"""`inspect(path)`: what is in a checkpoint, and everything that is wrong with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import FileError
from fxquant.gguf import GgufFile
from fxquant.inspection.data import HeldWeight, Inspection, Notes, StoredFile, StoredKind
from fxquant.inspection.held import Holder, held_without_model, tensors_of, type_of
from fxquant.inspection.opening import Opened, open_checked
from fxquant.inspection.places import Places, empty_places, find_places
from fxquant.inspection.settings import Told, told_by
from fxquant.inspection.values import fault_of_tensor, faults_of_planes
from fxquant.plans import name_pattern
from fxquant.pretrained import as_file_error
from fxquant.progress import bytes_progress
from fxquant.scheme import Scheme

_GENERATION = "generation_config.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model", "tekken.json"),
    *("sentencepiece*.model", "*bpe*.model"),
)


def inspect(path: str | os.PathLike[str], *, fast: bool = False, progress: bool = True) -> Inspection:
    """What is in a checkpoint: format, schemes, bits per weight, each weight of the model; and what is wrong with it.

    Every tensor is read, one after the other, and the model is never built: memory holds one matrix, or 32 MB of a
    tensor that is not quantized. What is wrong is not raised, but collected, as far as there is more to be read.

    Args:
        path: directory of a checkpoint in any format that `load` reads, or a GGUF file.
        fast: read the headers, and of quantized matrices the first of each kind: no numbers are looked at, and the
            schemes of the others are taken to be the same.
        progress: show a progress bar on stderr.

    Raises:
        FileError: there is nothing at the path that could be a checkpoint.
    """
    place = Path(path)
    if not place.exists():
        raise FileError(f"there is no directory and no file {place}")
    if not place.is_dir() and place.suffix != ".gguf":
        raise FileError(f"{place} is a file\n  give the directory of a transformers checkpoint, or a GGUF file")
    notes = Notes()
    opened = open_checked(place, notes)
    model = opened.model if opened.understood else None
    places = None
    if model is not None:
        # without any tensor, that is what is wrong, and not that each of the model is missing
        places = find_places(opened, model, notes) if opened.headers else empty_places(model)
    reading = _Reading(opened, places, notes, fast)
    with bytes_progress("inspecting", reading.total, enabled=progress) as done:
        reading.read(done)
    _check_others(opened, notes)
    told = told_by(opened)
    if model is None or places is None:
        weights = tuple(held_without_model(opened))
    else:
        weights = tuple(Holder(places, tensors_of(opened, places), told, reading.schemes).all(model))
    return _inspection(opened, told, model, weights, notes, fast)


@dataclass
class _Reading:
    """Reads all tensors, and notes what is wrong with them."""

    opened: Opened
    places: Places | None
    notes: Notes
    fast: bool
    schemes: dict[str, Scheme] = field(default_factory=dict)
    """By what the model calls the matrix."""
    _kinds: dict[Any, Scheme] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that there are to be read, about."""
        return sum(header.nbytes for header in self.opened.headers.values())

    def read(self, done: Callable[[int, str], None]) -> None:
        """Read them; `done` is told bytes and name of each."""
        matrices = {} if self.places is None else self.places.matrices
        for own in matrices:
            self._matrix(own)
            pieces = {piece.name: piece.index is not None for piece in matrices[own].pieces.values()}
            for name, stacked in pieces.items():
                header = self.opened.headers.get(name)
                if header is not None:
                    done(header.nbytes // (max(1, header.shape[0]) if stacked and header.shape else 1), own)
        if not self.fast:
            self._plain(done)

    def _matrix(self, own: str) -> None:
        assert self.places is not None
        weight, (n, k) = self.places.matrices[own], self.places.shapes[own]
        headers = {name: self.opened.headers.get(piece.name) for name, piece in weight.pieces.items()}
        # matrices of a kind have tensors of the same names, types and shapes
        kind = (
            name_pattern(own),
            n,
            k,
            tuple((name, type_of(header), header.shape) for name, header in headers.items() if header is not None),
        )
        if self.fast and kind in self._kinds:
            self.schemes[own] = self._kinds[kind]
            return
        with self.notes.noted(own):
            tensors = {name: self.opened.tensor(piece.name, piece.index) for name, piece in weight.pieces.items()}
            scheme, planes = weight.read(tensors, n, k)
            self.schemes[own] = self._kinds[kind] = scheme
            fault, remark = faults_of_planes(scheme, planes)
            if fault:
                self.notes.problem(own, fault)
            if remark:
                self.notes.remark(own, remark)

    def _plain(self, done: Callable[[int, str], None]) -> None:
        claimed = {piece.name for weight in self.opened.weights for piece in weight.pieces.values()}
        told = {one.place for one in self.notes.found}
        if self.places is None:
            claimed = set()  # nobody looks at them as planes
        for name, header in self.opened.headers.items():
            if name in claimed or name in told:
                continue
            with self.notes.noted(name):
                if fault := fault_of_tensor(header):
                    self.notes.problem(name, fault)
            done(header.nbytes, name)


def _check_others(opened: Opened, notes: Notes) -> None:
    """The files without tensors."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    if (folder / _GENERATION).is_file():
        from transformers import GenerationConfig

        with notes.noted(_GENERATION), as_file_error("it cannot be read"):
            GenerationConfig.from_pretrained(folder)
    if not _has_tokenizer(opened):
        notes.remark("", "there is no tokenizer")


def _has_tokenizer(opened: Opened) -> bool:
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    metadata = opened.files.metadata if isinstance(opened.files, GgufFile) else {}
    return bool(metadata.get("tokenizer.ggml.tokens")) or any(
        file.is_file() for pattern in _TOKENIZERS for file in folder.glob(pattern)
    )


def _inspection(
    opened: Opened, told: Told, model: nn.Module | None, weights: tuple[HeldWeight, ...], notes: Notes, fast: bool
) -> Inspection:
    config = opened.config
    dtype = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
    paths = sorted({header.file for header in opened.headers.values()})
    return Inspection(
        path=str(opened.path),
        format=opened.format,
        variant=told.variant,
        settings=told.settings,
        producer=told.producer,
        model="" if model is None else type(model).__name__,
        model_type=str(getattr(config, "model_type", "")),
        dtype="" if dtype is None else str(dtype).removeprefix("torch."),
        parameters=0 if model is None else sum(parameter.numel() for parameter in model.parameters()),
        tokenizer=_has_tokenizer(opened),
        files=tuple(StoredFile(file.name, file.stat().st_size) for file in paths if file.is_file()),
        kinds=_kinds(opened),
        weights=weights,
        found=tuple(notes.found),
        complete=not fast,
    )


def _kinds(opened: Opened) -> tuple[StoredKind, ...]:
    totals: dict[str, list[int]] = {}
    for header in opened.headers.values():
        total = totals.setdefault(type_of(header), [0, 0, 0])
        for i, more in enumerate((1, math.prod(header.shape), header.nbytes)):
            total[i] += more
    return tuple(StoredKind(dtype, *total) for dtype, total in totals.items())
