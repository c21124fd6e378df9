"""What an element family must be able to do: everything else about quantizing is the same for all of them."""

from __future__ import annotations

import functools
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fxquant.scheme import Element

TINY = 1e-38
"""Magnitudes below this one have no finite reciprocal in float32, or next to none."""


class Family(Protocol):
    """The elements of one kind: how their values, scales and codes belong together.

    Tensors are float32 if nothing else is said. Scales and zeros are per block, `[blocks]` or broadcast against the
    weights; a zero is None for schemes that have none.
    """

    @property
    def element(self) -> Element:
        """Which element of the family."""
        ...

    floor: ClassVar[float]
    """No scale is stored with a smaller magnitude than this (or than its dtype's smallest, if this is not 0)."""
    divides: ClassVar[bool]
    """Weights are divided by their scale; otherwise multiplied by its reciprocal, which is faster but not the same."""
    top: ClassVar[float]
    """The largest multiple of the unit that the least-squares search tries."""
    tries: ClassVar[int]
    """How many scales it tries before it narrows down."""

    @property
    def extent(self) -> float:
        """The largest magnitude of a weight in units."""
        ...

    def absmax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero that span the range of blocks, from their smallest and largest weight, 0 included."""
        ...

    def unit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `absmax`, for the scale in whose units the least-squares search goes on; may be negative."""
        ...

    def encode(self, t: Tensor, zero: Tensor | None) -> Tensor:
        """Weights in units of their scale to codes: unsigned fields in uint8 where codes are packed, else their dtype.

        May write over its argument, which is contiguous.
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """What `encode` gives to the values that it stands for, before zero and scale."""
        ...

    def project(self, t: Tensor, zero: Tensor | None, out: Tensor, spare: Tensor) -> None:
        """Weights in units of their scale to the nearest values minus zero, written to `out`; `spare` is scratch.

        Both are contiguous and have the shape of the weights.
        """
        ...


def bounded(scale: Tensor) -> Tensor:
    """The scale, or `TINY` with its sign where its magnitude is less."""
    return scale.abs().clamp_(min=TINY).copysign_(scale)


def reciprocal(scale: Tensor) -> Tensor:
    """`1 / bounded(scale)`: always finite."""
    return bounded(scale).reciprocal_()


@functools.lru_cache(maxsize=16)
def float_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the 256 bit patterns of an 8-bit float stand for, float32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).to(torch.float32)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """The values that codes of one byte have in a table."""
    return table.index_select(0, codes.contiguous().view(-1).to(torch.int32)).view(codes.shape)
