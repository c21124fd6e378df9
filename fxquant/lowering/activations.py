"""Activations in codes, in Inductor's own terms: what `fxquant.activation_codecs` computes, fused with what gives x."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.activation_codecs import FLOOR, LARGEST
from fxquant.inductor import lowered, once_for
from fxquant.lowering.dispatch import FLOAT8_CAPABILITY, WAYS, kind_of
from fxquant.lowering.values import aten, cast, small_float
from fxquant.scheme import Activation

_FLOAT = torch.float32


def encodes(x: Any, activation: Activation) -> bool:
    """Whether activations are quantized here: outliers are left to the op, and so is fp8 to old GPUs."""
    device, k = x.get_device(), str(x.get_size()[-1])
    known = k.isdigit() and int(k) > 0
    if activation.threshold or kind_of(device) not in WAYS or not known or x.get_dtype() == torch.float64:
        return False
    return activation.element == "int8" or torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def encoded(x: Any, activation: Activation, input_scale: Any | None) -> tuple[Any, Any]:
    """Codes `[..., K]` and scales as `fxquant.activation_codecs.quantize_activation` gives them, without outliers.

    GPUs divide to within two units in the last place here: a code can be the neighbour of the nearest one where x lies
    within 2**-21 of the middle between the two.
    """
    *batch, k = x.get_size()
    size, largest = activation.group or int(k), LARGEST[activation.element]
    blocks = lowered(aten.view, cast(x, _FLOAT), [*batch, int(k) // size, size])
    if input_scale is not None:
        scales = cast(input_scale, _FLOAT)
    else:
        scales = lowered(aten.div, lowered(aten.amax, lowered(aten.abs, blocks), [-1]), largest)
    scales = lowered(aten.maximum, scales, FLOOR)
    t = lowered(aten.div, blocks, lowered(aten.unsqueeze, scales, -1))
    t = lowered(aten.maximum, lowered(aten.minimum, t, largest), -largest)
    if activation.element == "int8":
        t = lowered(aten.round.default, t)
        codes = cast(lowered(aten.where, lowered(aten.isnan, t), 0.0, t), torch.int8)
    else:
        codes = lowered(aten.view.dtype, cast(t, torch.float8_e4m3fn), torch.uint8)
    return lowered(aten.view, codes, [*batch, k]), scales


def coded(x: Any, activation: Activation, input_scale: Any | None) -> tuple[Any, Any]:
    """The same, computed once for all that read x, unless they have scales of their own."""
    if input_scale is not None:
        return encoded(x, activation, input_scale)
    made: tuple[Any, Any] = once_for(x, activation, lambda: encoded(x, activation, None))
    return made


def numbers(codes: Any, dtype: torch.dtype) -> Any:
    """What codes stand for before their scales. Halves hold all of them."""
    integers = codes.get_dtype() == torch.int8
    return cast(codes if integers else small_float(codes, torch.float8_e4m3fn), dtype)


def decoded(codes: Any, scales: Any, activation: Activation) -> Any:
    """What codes and scales stand for: `[..., K]`, float32."""
    values, size = numbers(codes, _FLOAT), codes.get_size()
    if activation.group:
        values = lowered(aten.view, values, [*size[:-1], int(size[-1]) // activation.group, activation.group])
        scales = lowered(aten.unsqueeze, scales, -1)
    return lowered(aten.view, lowered(aten.mul, values, scales), list(size))


def by_row(scales: Any, m: Any) -> Any:
    """Scales `[m, groups]` of m rows in memory, of those too that have one in common."""
    if len(scales.get_size()) == 1:
        return lowered(aten.expand, lowered(aten.view, scales, [1, 1]), [m, 1])
    return lowered(aten.view, scales, [m, scales.get_size()[-1]])
