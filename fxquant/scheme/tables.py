"""The values of table elements, by code, and those that double quantization gives to scales."""

from __future__ import annotations

import functools
import itertools
import struct

# The 16 values of NormalFloat4: quantiles of N(0, 1) with an exact zero, scaled to [-1, 1].
# QLoRA, arXiv 2305.14314, appendix E; digits as bitsandbytes stores them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' FP4: sign, two exponent bits, one mantissa bit, scaled to [-1, 1]; code order as it stores them.
_FP4_HALF = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)
FP4 = (*_FP4_HALF, *(-v for v in _FP4_HALF))

# The 16 values of llama.cpp's IQ4 types, https://github.com/ggml-org/llama.cpp/blob/b4000/ggml/src/ggml-common.h
# (kvalues_iq4nl).
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


def small_float(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """The values of a small float without infinity and nan, by bit pattern: OCP Microscaling (MX) v1.0, section 5.3."""
    bias = (1 << (exponent_bits - 1)) - 1
    values = []
    for pattern in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(pattern, 1 << mantissa_bits)
        fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
        values.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return (*values, *(-value for value in values))


E2M1 = small_float(2, 1)
E2M3 = small_float(2, 3)
E3M2 = small_float(3, 2)


@functools.cache
def dynamic_values() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic data type, float32, sorted: Dettmers, arXiv 1511.04561.

    Decade i of 7, from the top one down, has 64, 32, ..., 1 values of either sign: the middles of equal steps of
    [0.1, 1]. Besides them there are 0 and 1. Every operation is rounded to float32, as where bitsandbytes makes them.
    """
    decades: list[float] = []
    for i in range(7):
        count, low = 1 << i, _float32(0.1)
        step = _float32((1 - low) / count)
        # The lower half is counted from 0.1, the upper one from 1.
        edges = [low + step * j if 2 * j <= count else 1 - step * (count - j) for j in range(count + 1)]
        edges = [_float32(edge) for edge in edges]
        middles = [_float32(_float32(a + b) / 2) for a, b in itertools.pairwise(edges)]
        decades += [_float32(middle * _float32(10.0 ** (i - 6))) for middle in middles]
    return tuple(sorted([*decades, *(-value for value in decades), 0.0, 1.0]))


def _float32(value: float) -> float:
    # No tensor: this runs where a compiler traces, to which a tensor would be one of its own.
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
