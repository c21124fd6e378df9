"""As torchao 0.18 quantizes: integers, fp8, MX and NVFP4, calculated in the dtype of the weight as it does."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.rules.rounding import magnitudes, to_float8, with_sign
from fxquant.codecs.rules.rule import Make, Rule, absmax, largest, no_rule, stored_and_used, working_dtype
from fxquant.codecs.search import extremes
from fxquant.scheme import FLOAT_SCALES, SCALE_TYPES, Element, Scheme

_INTEGERS = "int2 to int8, with -asym or without, in tensor, row, group and b<R>x<C> blocks with float scales"
_FLOATS = "fp8 and fp8e5m2 in the same blocks; mxfp4, mxfp6, mxfp6e3m2, mxfp8, mxfp8e5m2; nvfp4 and e2m1-g16-e4m3"
_NVFP4, _NVFP4_OF_ONE_LEVEL = Scheme.parse("nvfp4"), Scheme.parse("e2m1-g16-e4m3")
_MX = {
    Scheme.parse(name): exponent
    for name, exponent in (("mxfp4", 2), ("mxfp6", 2), ("mxfp6e3m2", 4), ("mxfp8", 8), ("mxfp8e5m2", 15))
}
"""MX schemes: exponent of the largest power of two that the element holds."""
_E4M3 = torch.finfo(torch.float8_e4m3fn)


def rule(scheme: Scheme) -> Make:
    """What torchao's configs do by default, on a CPU: bit-identical to the tensors that `from_hp` and the like make.

    int8 with float32 scales is `Int8Tensor`, all other integers are `IntxUnpackedToInt8Tensor`: symmetric ones with the
    mapping `SYMMETRIC`, which clips the largest weight of the positive side by half a step. fp8 is `Float8Tensor`,
    MX `to_mx` in its mode `FLOOR`, NVFP4 `nvfp4_quantize`, where two levels of scales stand for a tensor scale.
    Where the library divides 0 by 0 and stores nan, in fp8 and NVFP4, codes are 0. Blocks on the edge of a weight that
    does not consist of whole ones, which the library refuses, are filled up with zeros.

    Raises:
        SchemeError: another scheme.
    """
    bare = scheme.weight_only
    if bare in (_NVFP4, _NVFP4_OF_ONE_LEVEL):
        return partial(_nvfp4, scheme)
    if bare in _MX:
        return partial(_mx, scheme)
    if _is_integer(scheme):
        return partial(_integers, scheme, True)
    if _is_plain(scheme) and scheme.element in ("fp8", "fp8e5m2"):
        return partial(_fp8, scheme)
    raise no_rule("torchao", scheme, f"{_INTEGERS}; {_FLOATS}")


def no_clipping(scheme: Scheme) -> Make:
    """As `rule`, with the mapping `SYMMETRIC_NO_CLIPPING_ERR`, for integers without a zero point.

    Raises:
        SchemeError: another scheme.
    """
    if _is_integer(scheme) and scheme.zero == "none":
        return partial(_integers, scheme, False)
    raise no_rule("torchao-no-clipping", scheme, _INTEGERS.replace(", with -asym or without,", " without -asym,"))


def _is_plain(scheme: Scheme) -> bool:
    flat = scheme.block.flat
    return scheme.scale in FLOAT_SCALES and not (scheme.outer or scheme.double or scheme.columns or flat)


def _is_integer(scheme: Scheme) -> bool:
    return _is_plain(scheme) and scheme.element.startswith("int") and scheme.zero in ("none", "int")


def _integers(scheme: Scheme, clips: bool, weight: Tensor) -> Rule:
    dtype = working_dtype(weight)
    always_float32 = scheme.element == "int8" and scheme.scale == "fp32"
    smallest = torch.finfo(torch.float32).eps if always_float32 else torch.finfo(dtype).smallest_normal

    def choose(batch: Batch) -> dict[str, Tensor]:
        low, high = (extreme.to(dtype) for extreme in extremes(batch))
        scale = _spanning(low, high, scheme, clips).clamp(min=smallest)
        found = {}
        if scheme.zero == "int":
            found["zeros"] = (scheme.spec.low - (low / scale).round()).clamp_(scheme.spec.low, scheme.spec.high)
        used = scale.to(torch.float32) if always_float32 else scale
        found["scales"], used = stored_and_used(used, SCALE_TYPES[scheme.scale])
        return {**found, "inverses": 1.0 / used}

    factors = ("inverses", "zeros") if scheme.zero == "int" else ("inverses",)
    return Rule(choose, factors, partial(_encode_integers, element=scheme.spec, dtype=dtype))


def _spanning(low: Tensor, high: Tensor, scheme: Scheme, clips: bool) -> Tensor:
    smallest, largest = float(scheme.spec.low), float(scheme.spec.high)
    if scheme.zero == "int":
        return (high - low) / (largest - smallest)
    if clips:
        return torch.maximum(-low, high) / ((largest - smallest) / 2)
    return torch.maximum(low / smallest, high / largest)


def _encode_integers(
    x: Tensor, inverse: Tensor, zero: Tensor | None = None, *, element: Element, dtype: torch.dtype
) -> Tensor:
    codes = (x.to(dtype) * inverse).round_()
    if zero is not None:
        codes += zero
    codes.clamp_(element.low, element.high)
    return codes.to(element.dtype) if element.dtype is not None else (codes - element.low).to(torch.uint8)


def _fp8(scheme: Scheme, weight: Tensor) -> Rule:
    dtype, element = working_dtype(weight), scheme.spec

    def choose(batch: Batch) -> dict[str, Tensor]:
        scale = (absmax(batch).to(dtype) / element.bound).to(torch.float32)
        stored, used = stored_and_used(scale, SCALE_TYPES[scheme.scale])
        return {"scales": stored, "divisors": used}

    def encode(x: Tensor, divisor: Tensor) -> Tensor:
        return to_float8((x / divisor).nan_to_num_(nan=0.0), element)

    return Rule(choose, ("divisors",), encode)


def _mx(scheme: Scheme, weight: Tensor) -> Rule:
    element = scheme.spec

    def choose(batch: Batch) -> dict[str, Tensor]:
        exponent = (absmax(batch).view(torch.int32) >> 23) - 127  # of what is subnormal, and of 0: -127
        code = (exponent - _MX[scheme.weight_only] + 127).clamp_(min=0)
        # Weights are never divided by 2**-127, as which code 0 is read.
        unit = torch.ldexp(torch.ones_like(code, dtype=torch.float32), code.clamp(min=1) - 127)
        return {"scales": code.to(torch.uint8), "units": unit}

    def encode(x: Tensor, unit: Tensor) -> Tensor:
        t = x / unit
        return to_float8(t, element) if element.float_dtype is not None else _small_float(t, element)

    return Rule(choose, ("units",), encode)


def _nvfp4(scheme: Scheme, weight: Tensor) -> Rule:
    element = scheme.spec
    # One level is as two with an upper one of 1, rounding included.
    above = largest(weight) / (_E4M3.max * element.bound) if scheme.outer else torch.ones((), device=weight.device)

    def choose(batch: Batch) -> dict[str, Tensor]:
        scale = (absmax(batch) / element.bound / above).nan_to_num_(nan=0.0).clamp_(_E4M3.tiny, _E4M3.max)
        stored = scale.to(torch.float8_e4m3fn)
        return {"scales": stored.view(torch.uint8), "factors": (1.0 / above) / stored.to(torch.float32)}

    def encode(x: Tensor, factor: Tensor) -> Tensor:
        return _small_float((x * factor).nan_to_num_(nan=0.0), element)

    return Rule(choose, ("factors",), encode, {"scale_scales": above.view(1, 1)} if scheme.outer else {})


def _small_float(t: Tensor, element: Element) -> Tensor:
    """To the nearest, halves to even; the sign is kept even of what is 0."""
    return with_sign(magnitudes(t, element), t.signbit(), element)
