"""As compressed-tensors 0.20 quantizes: integers, fp8, NVFP4 and MX, in the dtype of the weight."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.rules.rounding import magnitudes, to_float8, with_sign
from fxquant.codecs.rules.rule import Make, Rule, absmax, largest, no_rule, stored_and_used, working_dtype
from fxquant.codecs.search import extremes
from fxquant.scheme import FLOAT_SCALES, SCALE_TYPES, Element, Scheme

_SCHEMES = (
    "int2 to int8, with -asym or without, and fp8, in tensor, row, group and b<R>x<C> blocks with float scales; "
    "nvfp4, mxfp4, mxfp6 and mxfp8"
)
_NVFP4 = Scheme.parse("nvfp4")
_MX = {Scheme.parse("mxfp4"): 2, Scheme.parse("mxfp6"): 2, Scheme.parse("mxfp8"): 8}
"""MX schemes: exponent of the largest power of two that the element holds."""
# In place of a scale of 0: `torch.finfo(dtype).eps`, and for types that are no torch float, these.
_NO_SCALE = {torch.float8_e4m3fn: 0.125, torch.uint8: 1.0}

_ZERO_POINT = 0.0
"""What it adds to fp8 also where weights are symmetric, which makes 0 of -0."""


def rule(scheme: Scheme) -> Make:
    """Bit-identical to its `calculate_qparams` and `quantize` on a CPU, with min and max of each block.

    A weight and a scale of 0 give code 0. The library divides by NVFP4's global scale, which it calculates in the
    dtype of the weight; the plane has the float32 reciprocal of it.

    Raises:
        SchemeError: another scheme.
    """
    bare = scheme.weight_only
    if bare == _NVFP4:
        return partial(_nvfp4, scheme)
    if bare in _MX:
        return partial(_mx, scheme)
    plain = scheme.scale in FLOAT_SCALES and not (scheme.outer or scheme.double or scheme.columns or scheme.block.flat)
    if plain and scheme.element.startswith("int") and scheme.zero in ("none", "int"):
        return partial(_integers, scheme)
    if plain and scheme.element == "fp8":
        return partial(_fp8, scheme)
    raise no_rule("compressed-tensors", scheme, _SCHEMES)


def _no_zeros(scale: Tensor, smallest: float) -> Tensor:
    return torch.where(scale == 0, smallest, scale)


def _integers(scheme: Scheme, weight: Tensor) -> Rule:
    dtype, element = working_dtype(weight), scheme.spec
    factors = ("divisors", "zeros") if scheme.zero == "int" else ("divisors",)
    return Rule(
        partial(_choose_integers, scheme=scheme, dtype=dtype),
        factors,
        partial(_encode_integers, element=element, dtype=dtype),
    )


def _choose_integers(batch: Batch, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    element = scheme.spec
    low, high = (extreme.to(dtype) for extreme in extremes(batch))
    steps = low.new_tensor(element.high - element.low)
    found = {}
    if scheme.zero == "none":
        scale = torch.maximum(low.abs(), high) / (steps / 2)
    else:
        scale = (high - low) / steps
        # 0 / 0 in a block of zeros: any zero point is right, and the library's cast of nan gives 0.
        zero = (element.low - low / scale).clamp_(element.low, element.high)
        found["zeros"] = zero.nan_to_num_(nan=0.0).round_()
    scale = _no_zeros(scale, torch.finfo(dtype).eps)
    found["scales"], found["divisors"] = stored_and_used(scale, SCALE_TYPES[scheme.scale])
    return found


def _encode_integers(
    x: Tensor, divisor: Tensor, zero: Tensor | None = None, *, element: Element, dtype: torch.dtype
) -> Tensor:
    codes = x.to(dtype) / divisor
    if zero is not None:
        codes += zero
    codes = codes.clamp_(element.low, element.high).round_()
    return codes.to(element.dtype) if element.dtype is not None else (codes - element.low).to(torch.uint8)


def _fp8(scheme: Scheme, weight: Tensor) -> Rule:
    dtype, element = working_dtype(weight), scheme.spec

    def choose(batch: Batch) -> dict[str, Tensor]:
        top = absmax(batch).to(dtype)
        scale = _no_zeros(top / top.new_tensor(element.bound), torch.finfo(dtype).eps)
        stored, used = stored_and_used(scale, SCALE_TYPES[scheme.scale])
        return {"scales": stored, "divisors": used}

    def encode(x: Tensor, divisor: Tensor) -> Tensor:
        return to_float8(x.to(dtype) / divisor + _ZERO_POINT, element)

    return Rule(choose, ("divisors",), encode)


def _nvfp4(scheme: Scheme, weight: Tensor) -> Rule:
    dtype, element, inner = working_dtype(weight), scheme.spec, torch.float8_e4m3fn
    top, limit = largest(weight).to(dtype), torch.finfo(inner).max
    # Written as a number over a tensor, which torch calculates as the product with a rounded reciprocal.
    unbounded = limit * element.bound / top.clamp(min=torch.finfo(dtype).tiny)
    above = torch.nan_to_num(unbounded, posinf=1.0).to(torch.float32)

    def choose(batch: Batch) -> dict[str, Tensor]:
        scale = absmax(batch).to(dtype)
        scale = above.view(1) * (scale / scale.new_tensor(element.bound))
        scale = scale.clamp(-limit, limit).to(inner).to(torch.float32)
        scale = _no_zeros(scale, _NO_SCALE[inner])
        return {"scales": scale.to(inner).view(torch.uint8), "divisors": scale / above}

    def encode(x: Tensor, divisor: Tensor) -> Tensor:
        return _e2m1(x / divisor, element)

    return Rule(choose, ("divisors",), encode, {"scale_scales": above.reciprocal().view(1, 1)})


def _mx(scheme: Scheme, weight: Tensor) -> Rule:
    dtype, element = working_dtype(weight), scheme.spec

    def choose(batch: Batch) -> dict[str, Tensor]:
        power = _power(absmax(batch).to(dtype), mantissa=3 if scheme.element == "e2m3" else 1)
        code = (_biased(power) - _MX[scheme.weight_only]).clamp_(min=0)
        # In float16 the smallest powers are 0, and become 1.
        unit = _no_zeros(torch.ldexp(torch.ones_like(power), code - 127), _NO_SCALE[torch.uint8])
        return {"scales": torch.where(power.isfinite(), _biased(unit), 255).to(torch.uint8), "units": unit}

    def encode(x: Tensor, unit: Tensor) -> Tensor:
        t = x.to(dtype) / unit
        if element.float_dtype is not None:
            return to_float8(t + _ZERO_POINT, element)
        t = t.to(torch.float32)
        return (
            _e2m1(t, element) if scheme.element == "e2m1" else with_sign(magnitudes(t, element), t.signbit(), element)
        )

    return Rule(choose, ("units",), encode)


def _e2m1(t: Tensor, element: Element) -> Tensor:
    """What is negative and rounds to 0 is -0, and -0 itself is 0."""
    return with_sign(magnitudes(t, element), t < 0, element)


def _biased(power: Tensor) -> Tensor:
    """The exponent of a power of two, with the bias of e8m0; 0 for 0."""
    return torch.where(power > 0, power.to(torch.float32).frexp().exponent + 126, 0)


def _power(top: Tensor, mantissa: int) -> Tensor:
    """The power of two below, or the one above where that is nearer in an element with so many bits of mantissa.

    On the bits of the dtype: what is subnormal in it becomes 0.
    """
    width, view = (23, torch.int32) if top.dtype == torch.float32 else (0, torch.int16)
    if not width:
        width = 7 if top.dtype == torch.bfloat16 else 10
    bits = top.view(view) + (1 << (width - mantissa - 1))
    return (bits & -(1 << width)).view(top.dtype)
