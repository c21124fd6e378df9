"""Small floats with a scale: fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codecs.family import Family, look_up
from fxquant.scheme import Element


def _absmax(low: Tensor, high: Tensor, element: Element, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The scale that maps the largest magnitude of a block to the largest value of the element."""
    return torch.maximum(-low, high) / element.bound, None


def _encode(t: Tensor, zero: Tensor | None, element: Element) -> Tensor:
    assert element.dtype is not None
    # Without the clamp, what rounds to more than the largest value becomes nan.
    return t.clamp_(-element.bound, element.bound).to(element.dtype)


def _project(t: Tensor, zero: Tensor | None, element: Element, out: Tensor, spare: Tensor) -> None:
    out.copy_(look_up(_encode(out.copy_(t), zero, element), element))


FLOATS = Family(
    absmax=_absmax,
    unit=_absmax,
    encode=_encode,
    decode=look_up,
    project=_project,
    factors=tuple(2.0 ** (-i / 8) for i in range(8)),
    floor=torch.finfo(torch.float32).smallest_normal,
    divides=True,
)
