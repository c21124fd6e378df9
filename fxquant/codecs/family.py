"""What an element family must be able to do: everything else about quantizing is the same for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.scheme import Element

TINY = 1e-38
"""Magnitudes below this one have no finite reciprocal in float32, or next to none."""


@dataclass(frozen=True)
class Family:
    """The functions of one element family. Tensors are float32 and broadcast; scales and zeros are per block.

    A zero is None for schemes that have none.
    """

    absmax: Callable[[Tensor, Tensor, Element, bool], tuple[Tensor, Tensor | None]]
    """Scale and zero from the blocks' smallest and largest weight (0 included) and whether there is a zero."""
    unit: Callable[[Tensor, Tensor, Element, bool], tuple[Tensor, Tensor | None]]
    """As `absmax`, for the scale that the factors of the search multiply; may be negative."""
    encode: Callable[[Tensor, Tensor | None, Element], Tensor]
    """Weights in units of their scale to codes: unsigned fields in uint8 where codes are packed, else the element's
    dtype. May write over its argument."""
    decode: Callable[[Tensor, Element], Tensor]
    """What `encode` gives to the float32 values that the codes stand for, before zero and scale."""
    project: Callable[[Tensor, Tensor | None, Element, Tensor, Tensor], None]
    """Weights in units of their scale to the nearest values minus zero, written to the fourth argument; the fifth one
    is scratch memory. Both are contiguous and have the shape of the weights."""
    factors: tuple[float, ...]
    """What the least-squares search tries on the unit."""
    floor: float
    """No scale is stored with a smaller magnitude than this (or than its dtype's smallest, if this is not 0)."""
    divides: bool = False
    """Weights are divided by their scale; otherwise multiplied by its reciprocal, which is faster but not the same."""


def bounded(scale: Tensor) -> Tensor:
    """The scale, or `TINY` with its sign where its magnitude is less."""
    return scale.abs().clamp_(min=TINY).copysign_(scale)


def reciprocal(scale: Tensor) -> Tensor:
    """`1 / bounded(scale)`: always finite."""
    return bounded(scale).reciprocal_()


def look_up(codes: Tensor, element: Element) -> Tensor:
    """The float32 values of stored codes of an element of kind table or float."""
    table = _table(element, codes.device)
    return table.index_select(0, codes.contiguous().view(-1).view(torch.uint8).to(torch.int32)).view(codes.shape)


@functools.lru_cache(maxsize=32)
def _table(element: Element, device: torch.device) -> Tensor:
    if element.kind == "table":
        return torch.tensor(element.values, dtype=torch.float32, device=device)
    assert element.dtype is not None
    codes = torch.arange(1 << element.bits, dtype=torch.uint8, device=device)
    return codes.view(element.dtype).to(torch.float32)
