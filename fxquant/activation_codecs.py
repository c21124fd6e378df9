"""Between activations and their codes, for every `Activation` there is."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.scheme import Activation

LARGEST: Mapping[str, float] = MappingProxyType({"int8": 127.0, "fp8": 448.0})
"""Magnitude of the largest code of an element: integers leave -128 alone, e4m3 ends at 448."""
CODE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"int8": torch.int8, "fp8": torch.uint8})
"""What stores a code; bit patterns of fp8 are uint8, as they are in the planes of weights."""
FLOOR = torch.finfo(torch.float32).smallest_normal
"""No scale is smaller: a GPU may flush what is smaller to zero, and zero divides nothing."""
_SMALLEST_HALF = 2.0**-24


def quantize_activation(x: Tensor, activation: Activation, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of an input, computed in float32.

    `scale = max(absmax / L, FLOOR)` with L = 127 (int8) or 448 (fp8), over a token or a group of its features; static
    activations have `input_scale` instead. `code = x / scale`, clamped to +-L, rounded half to even: to an integer, or
    to e4m3fn. A token (a group) with an inf or a nan has the scale inf or nan, so that no such value goes unnoticed;
    where scales are static, inf is clipped and a nan stays one in fp8 and is 0 in int8.

    Under a threshold (LLM.int8, arXiv 2208.07339, section 3; bit-identical to bitsandbytes' `int8_vectorwise_quant`):
    x is rounded to float16, elements that reach the threshold count as 0, `scale = absmax / 127`,
    `code = x * (127 / absmax)`, and all codes of an `outlier_features` are 0.

    Args:
        x: `[..., K]`, any float dtype and strides.
        activation: how to quantize it.
        input_scale: of static activations, float32 `[1]`.

    Returns:
        Codes `[..., K]`, int8 or the bit patterns of fp8 in uint8, contiguous, and their scales, float32
        `[..., groups]`, where a whole token is one group; `[1]` for static activations.
    """
    if activation.threshold:
        return _without_outliers(x, activation.threshold)
    k, largest = x.shape[-1], LARGEST[activation.element]
    size = activation.group or k
    blocks = x.to(torch.float32).reshape(*x.shape[:-1], k // size if k else 1, size)
    if activation.static:
        assert input_scale is not None
        scales = input_scale.to(torch.float32)
    else:
        scales = blocks.abs().amax(-1) / largest if size else blocks.new_zeros(blocks.shape[:-1])
    scales = scales.clamp(min=FLOOR)
    t = (blocks / scales.unsqueeze(-1)).clamp_(-largest, largest)
    codes = _integers(t) if activation.element == "int8" else t.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.reshape(x.shape).contiguous(), scales.contiguous()


def dequantize_activation(codes: Tensor, scales: Tensor, activation: Activation) -> Tensor:
    """What codes and scales stand for: `[..., K]`, float32."""
    codes = codes.contiguous()  # strides decide the order of later sums
    if activation.element == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    values = codes.to(torch.float32)
    if not activation.group:
        return values.mul_(scales)
    return values.view(*scales.shape, activation.group).mul_(scales.unsqueeze(-1)).view(codes.shape)


def outlier_features(x: Tensor, threshold: float) -> Tensor:
    """Which features reach the threshold in any token, bool `[K]`, after x `[..., K]` is rounded to float16."""
    return _features(_rounded_tokens(x), threshold)


def _without_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    values = _rounded_tokens(x)
    features = _features(values, threshold)
    # A host that can look without waiting for a device saves two passes where there are none, which are slow on a CPU.
    masked = x.device.type != "cpu" or bool(features.any())
    if masked:
        values.masked_fill_(values.abs() >= _half(threshold), 0)
    absmax = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(len(values), 1)
    codes = _integers(values * (127.0 / absmax.clamp(min=_SMALLEST_HALF)))
    if masked:
        codes.masked_fill_(features, 0)
    return codes.view(x.shape), (absmax / 127.0).view(*x.shape[:-1], 1)


def _rounded_tokens(x: Tensor) -> Tensor:
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return tokens.contiguous().to(torch.float16).to(torch.float32)


def _features(values: Tensor, threshold: float) -> Tensor:
    if not len(values):
        return values.new_zeros(values.shape[1], dtype=torch.bool)
    return values.abs().nan_to_num_(nan=0.0).amax(0) >= _half(threshold)


def _half(threshold: float) -> float:
    # torch compares a float16 tensor with a number that is rounded to float16.
    return float(struct.unpack("e", struct.pack("e", threshold))[0])


def _integers(t: Tensor) -> Tensor:
    # What a nan becomes in a cast to an integer differs from device to device.
    return t.round_().nan_to_num_(nan=0.0).to(torch.int8)
