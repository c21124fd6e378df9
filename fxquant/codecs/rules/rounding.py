"""Roundings that libraries use and torch has no function for, and codes of small floats by their bit patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.scheme import ELEMENTS, Element

_MANTISSAS = {ELEMENTS["e2m1"]: (1, 0), ELEMENTS["e2m3"]: (3, 0), ELEMENTS["e3m2"]: (2, -2)}
"""Bits of the mantissa, and the exponent of the smallest normal value."""


def half_away(x: Tensor) -> Tensor:
    """The nearest integer, halves away from zero. Not `floor(|x| + 0.5)`, which rounds what lies just below a half."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (magnitude - whole >= 0.5)).copysign(x)


def magnitudes(x: Tensor, element: Element, to_even: bool = True) -> Tensor:
    """Bit patterns, without the sign, of the nearest values of a small float.

    Args:
        x: float32, in units of its scale.
        element: a key of `_MANTISSAS`. What is too large for it becomes its largest value.
        to_even: in the middle of two values, take the even pattern; otherwise the lower one.

    Returns:
        uint8, in the shape of `x`.
    """
    mantissa, lowest = _MANTISSAS[element]
    magnitude = x.abs().clamp_(max=element.bound)
    # Patterns are the multiples of the last place, one range of values with the same exponent after the other.
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp_(min=lowest)
    places = magnitude * ((mantissa + 127 - exponent) << 23).view(torch.float32)
    places = places.round_() if to_even else places.sub_(0.5).ceil_()
    return places.to(torch.int32).add_((exponent - lowest) << mantissa).to(torch.uint8)


def with_sign(patterns: Tensor, negative: Tensor, element: Element) -> Tensor:
    """Bit patterns with the sign bit set where `negative`."""
    return patterns | (negative.to(torch.uint8) << (element.bits - 1))


def to_float8(x: Tensor, element: Element) -> Tensor:
    """Torch's own cast, saturating, as bit patterns."""
    assert element.float_dtype is not None
    return x.clamp(-element.bound, element.bound).to(element.float_dtype).view(torch.uint8)
