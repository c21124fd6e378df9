"""As gguf 0.19 (gguf-py) and ggml's reference functions in C quantize the types that need no search."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.rules.rounding import half_away, magnitudes, with_sign
from fxquant.codecs.rules.rule import Make, Rule, no_rule, over
from fxquant.scheme import ELEMENTS, Scheme


def _inverse(d: Tensor) -> Tensor:
    """`1 / d`; 0 for 0, and where there is no finite one: of that, ggml casts infinity to an integer."""
    inverse = d.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _scaled(d: Tensor) -> dict[str, Tensor]:
    # Codes are chosen with the scale before it is rounded to float16.
    return {"scales": d.to(torch.float16), "inverses": _inverse(d)}


def _peak(batch: Batch, low: int) -> dict[str, Tensor]:
    """The weight of the largest magnitude, the first of several, gets the lowest code."""
    x = batch.pieces[0]()
    peak = x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1)
    return _scaled(peak / low)


def _range(batch: Batch, high: int) -> dict[str, Tensor]:
    """From the smallest weight to the largest, 0 included or not."""
    x = batch.pieces[0]()
    low = x.gather(1, x.argmin(1, keepdim=True)).squeeze(1)  # of 0 and -0 the first, as in C
    spans = (x.amax(1) - low).abs()  # and therefore never -0
    return {**_scaled(over(spans, high)), "biases": low.to(torch.float16), "lows": low}


def _top(batch: Batch, high: int) -> dict[str, Tensor]:
    return _scaled(over(batch.pieces[0]().abs().amax(1), high))


def _power(batch: Batch) -> dict[str, Tensor]:
    """`floor(log2(absmax)) - 2`. The logarithm is a float32, which just below a power of two is that power's.

    Below 2**-125 ggml casts a negative number to an unsigned one; here the smallest scale is taken.
    """
    top = batch.pieces[0]().abs().amax(1)
    exponent = top.to(torch.float64).log2().to(torch.float32).floor()
    code = torch.where(top > 0, exponent - 2 + 127, 0.0).clamp_(min=0)
    return {"scales": code.to(torch.uint8), "units": torch.ldexp(torch.ones_like(top), code - 127)}


def _fields(x: Tensor, inverse: Tensor, low: int, high: int) -> Tensor:
    return (x * inverse + (0.5 - low)).trunc_().clamp_(0, high - low).to(torch.uint8)


def _fields_above(x: Tensor, inverse: Tensor, low: Tensor, high: int) -> Tensor:
    return ((x - low) * inverse + 0.5).trunc_().clamp_(0, high).to(torch.uint8)


def _rounded(x: Tensor, inverse: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    return (half_away(x * inverse) + shift).to(dtype)


def _e2m1(x: Tensor, unit: Tensor) -> Tensor:
    """The nearest value, the one closer to 0 of two at the same distance; there is no -0."""
    element = ELEMENTS["e2m1"]
    found = magnitudes(x / unit, element, to_even=False)
    return with_sign(found, (x < 0) & (found > 0), element)


def _rules() -> Mapping[str, Rule]:
    signed = {"q4_0": (-8, 7), "q5_0": (-16, 15)}
    ranged = {"q4_1": 15, "q5_1": 31}
    topped = {"q8_0": (127, 0, torch.int8), "tq1_0": (1, 1, torch.uint8), "tq2_0": (1, 1, torch.uint8)}
    return {
        **{
            name: Rule(partial(_peak, low=low), ("inverses",), partial(_fields, low=low, high=high))
            for name, (low, high) in signed.items()
        },
        **{
            name: Rule(partial(_range, high=high), ("inverses", "lows"), partial(_fields_above, high=high))
            for name, high in ranged.items()
        },
        **{
            name: Rule(partial(_top, high=high), ("inverses",), partial(_rounded, shift=shift, dtype=dtype))
            for name, (high, shift, dtype) in topped.items()
        },
        "mxfp4": Rule(_power, ("units",), _e2m1),
    }


_RULES: Mapping[Scheme, Rule] = MappingProxyType({Scheme.parse(name): rule for name, rule in _rules().items()})
_SCHEMES = f"{', '.join(map(str, _RULES))}; not for K-quants and IQ types, whose scales ggml searches for in C"


def rule(scheme: Scheme) -> Make:
    """Bit-identical to `gguf.quants.quantize` on a CPU, which says so of itself and ggml.

    Scales and biases are float16, codes are chosen with what they were before they were rounded. Where the library
    casts infinity or nan to an integer, codes stand for 0.

    Raises:
        SchemeError: another scheme.
    """
    found = _RULES.get(scheme.weight_only)
    if found is None:
        raise no_rule("gguf", scheme, _SCHEMES)
    return lambda weight: found
