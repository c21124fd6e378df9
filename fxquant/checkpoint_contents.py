"""What a checkpoint that is to be written holds, told before the first of its tensors is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fxquant.scheme import PlaneSpec, Scheme


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix `[n, k]`: the weight of a linear, or one projection of one expert."""

    name: str
    """Of its module, as the checkpoint that is read calls it: `model.layers.0.mlp.experts.17.w1`."""
    own: str
    """As the model calls it: `model.layers.0.mlp.experts.17.gate_proj`."""
    n: int
    k: int
    scheme: Scheme


@dataclass(frozen=True)
class Contents:
    """Everything in a checkpoint."""

    path: Path
    """What is read: a directory, or a GGUF file."""
    config: Any
    """Of transformers, without a word of quantization."""
    model: nn.Module
    """The model that it describes, without weights, on the meta device; nothing of it is replaced."""
    matrices: Mapping[str, Matrix]
    """By their names in the checkpoint that is read."""
    plain: Mapping[str, PlaneSpec]
    """Shapes and dtypes of all other tensors, by theirs: `model.norm.weight`."""


@dataclass(frozen=True)
class Fit:
    """How a format takes up a matrix."""

    scheme: Scheme | None
    """The one in which it is written: its own where that is exact; None: in full precision."""
    reason: str = ""
    """Why it is not its own, or not to the last bit; empty: what is read back are the same weights."""


class Reader(Protocol):
    """Gives the tensors of a checkpoint, each when it is asked for."""

    def planes(self, matrix: str) -> Mapping[str, Tensor]:
        """The planes of a matrix, in the scheme that `Contents.matrices` gives it."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantized."""
        ...


@dataclass(frozen=True)
class Unit:
    """Tensors that are made in one go: one linear, or the experts of one layer."""

    inputs: tuple[str, ...]
    """Names of the matrices and plain tensors that `make` reads; no two units share one."""
    tensors: Mapping[str, PlaneSpec]
    """What `make` gives."""
    make: Callable[[Reader], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Writer:
    """A format in which checkpoints can be written."""

    fit: Callable[[Mapping[str, Matrix]], Mapping[str, Fit]]
    """Which scheme each matrix gets, by the keys that are given; asked once, of all of them, before anything else.

    All at once, for some formats have settings that hold for all linears of a checkpoint.
    """
    units: Callable[[Contents], Iterable[Unit]]
    """All tensors of the files, of contents whose matrices have the schemes that `fit` gave.

    Raises FileError: the format has no place for something.
    """
    config: Callable[[Contents], Mapping[str, Any]]
    """What `config.json` says as `quantization_config`."""
