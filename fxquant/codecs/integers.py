"""Integers with a scale, and a zero point or none: int8, int4, uint4, ..."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codecs.family import Family
from fxquant.scheme import Element


def _absmax(low: Tensor, high: Tensor, element: Element, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The scale that makes the whole range of a block representable.

    Bit-identical to torchao's `choose_qparams_affine` on float32 weights. Symmetric: `SYMMETRIC_NO_CLIPPING_ERR`, the
    mapping under which no weight is clipped (`SYMMETRIC` maps the largest one to 7.5 of 7), so that every weight is
    within half a step. Asymmetric: `ASYMMETRIC`, with an integer zero point in the range of the codes.
    """
    floor = torch.finfo(torch.float32).smallest_normal
    if not asymmetric:
        return torch.maximum(low / float(element.low), high / float(element.high)).clamp_(min=floor), None
    scale = ((high - low) / float(element.high - element.low)).clamp_(min=floor)
    return scale, (element.low - torch.round(low / scale)).clamp_(element.low, element.high)


def _unit(low: Tensor, high: Tensor, element: Element, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    if asymmetric:
        return _absmax(low, high, element, asymmetric)
    # The sign gives the one code more that negative numbers have to the side with the larger weights.
    scale = torch.maximum(-low, high) / ((element.high - element.low) / 2)
    return torch.where(high > -low, -scale, scale), None


def _encode(t: Tensor, zero: Tensor | None, element: Element) -> Tensor:
    codes = t.round_() if zero is None else t.round_().add_(zero)
    codes.clamp_(element.low, element.high)
    if element.dtype is not None:
        return codes.to(element.dtype)
    return codes.sub_(element.low).to(torch.int8).view(torch.uint8)


def _decode(codes: Tensor, element: Element) -> Tensor:
    values = codes.to(torch.float32)
    return values if element.dtype is not None else values.add_(element.low)


def _project(t: Tensor, zero: Tensor | None, element: Element, out: Tensor, spare: Tensor) -> None:
    torch.round(t, out=out)
    if zero is None:
        out.clamp_(element.low, element.high)
    else:
        torch.maximum(out, element.low - zero, out=out)
        torch.minimum(out, element.high - zero, out=out)


INTEGERS = Family(
    absmax=_absmax,
    unit=_unit,
    encode=_encode,
    decode=_decode,
    project=_project,
    factors=tuple(1.05 - 0.45 * i / 11 for i in range(12)),
    floor=torch.finfo(torch.float32).smallest_normal,
)
