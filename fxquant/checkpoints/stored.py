"""The quantized matrices of a checkpoint, as its tensors hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fxquant.checkpoints.source import Planes


@dataclass(frozen=True)
class Piece:
    """A tensor of the files, or one of those that it stacks along its first dimension."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class StoredWeight:
    """One quantized matrix: which tensors hold it, and how they become planes."""

    name: str
    """Of its module, as the checkpoint calls it: `model.layers.0.self_attn.q_proj`, `...mlp.experts.17.down_proj`."""
    pieces: Mapping[str, Piece]
    """Its tensors, by the names that `read` knows: `qweight`, `weight.absmax`."""
    read: Callable[[Mapping[str, Tensor], int, int], Planes]
    """Takes the tensors of the pieces, N and K; gives the scheme and the planes.

    Raises CheckpointError: they are not what the format says.
    """
