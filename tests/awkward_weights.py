"""Weights of kinds that have broken somebody's quantizer, and comparisons with what a library makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxquant.bits import unpack
from fxquant.codecs import quantize
from fxquant.errors import SchemeError
from fxquant.scheme import Scheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAGNITUDES = [1e-38, 1e-30, 1e-3, 1.0, 1e3, 1e30]


def _every_third_row_zero(weight: Tensor) -> Tensor:
    weight[:: max(len(weight) // 3, 1)] = 0
    return weight


def _with(weight: Tensor, at: slice, value: float) -> Tensor:
    weight.view(-1)[at] = value
    return weight


def _halves(weight: Tensor, largest: float) -> Tensor:
    """Multiples of a half, which lie in the middle of two codes where `largest` makes a scale of 1."""
    return _with((weight * 8).round().clamp(-2 * largest, 2 * largest) / 2, slice(0, None, 16), largest)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda weight: weight,
    "zero rows": _every_third_row_zero,
    "all zero": torch.zeros_like,
    "zero end": lambda weight: _with(weight, slice(-min(weight.numel(), 40), None), 0.0),
    "negative zeros": lambda weight: _with(weight, slice(0, None, 3), -0.0),
    "constant": lambda weight: weight[:1, :1].expand(weight.shape).contiguous(),
    "positive": torch.abs,
    "negative": lambda weight: -weight.abs(),
    "far from zero": lambda weight: weight * 0.01 + 1,
    "steps": lambda weight: (weight * 4).round() / 4,
    "halves of 7.5": lambda weight: _halves(weight, 7.5),
    "halves of 7": lambda weight: _halves(weight, 7),
    "halves of 8": lambda weight: _halves(weight, 8),
    "just below halves": lambda weight: _with(_halves(weight, 8) * (1 - 2**-21), slice(0, None, 16), 8),
    "quarters of 6.75": lambda weight: _with(_halves(weight, 12) / 2 * 1.125, slice(0, None, 16), 6.75),
    "powers": lambda weight: weight.sign() * weight.abs().log2().round().exp2(),
    "just below powers": lambda weight: weight.sign() * weight.abs().log2().round().exp2() * (1 - 2**-23),
    "outliers": lambda weight: _with(weight, slice(0, None, 37), 100.0),
    "one huge": lambda weight: _with(weight * 1e-4, slice(0, 1), 250.0),
    "subnormal": lambda weight: weight * 1e-40,
}


def awkward(seed: int, n: int, k: int, dtype: torch.dtype, magnitude: float, kind: str) -> Tensor:
    """A weight `[n, k]` of this kind, in magnitudes that its dtype has."""
    weight = KINDS[kind](torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))
    if dtype == torch.float16:
        magnitude = min(max(magnitude, 1e-7), 1e2)
    return (weight * magnitude).to(dtype)


WEIGHTS = (
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(DTYPES),
    st.sampled_from(MAGNITUDES),
    st.sampled_from(list(KINDS)),
)
"""Arguments for `awkward`, with a number of groups in place of `k`."""


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit: not even the sign of a zero may differ."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def integers(plane: Tensor, scheme: Scheme, k: int) -> Tensor:
    """The integers that a plane of codes or zeros holds."""
    element = scheme.spec
    return plane.to(torch.int64) if element.dtype is not None else unpack(plane, element.bits, k).long() + element.low


def blocks_of(scheme: Scheme, n: int, k: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    return scheme.block.rows or n, scheme.block.columns or k


def quantized(weight: Tensor, scheme: Scheme, library: str) -> dict[str, Tensor] | None:
    """Our planes; None, and what it should say, where the library would store an infinite scale."""
    try:
        return quantize(weight, scheme, library)
    except SchemeError as error:
        if "finite scale" not in str(error) and "casts to float16" not in str(error):
            raise
        return None
