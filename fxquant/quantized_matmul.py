"""The product of an input that is codes and a weight that is planes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import native
from fxquant.activation_codecs import dequantize_activation, outlier_features
from fxquant.codecs import dequantize
from fxquant.scheme import FLOAT_SCALES, ROW, TENSOR, Activation, Scheme

_MOST_FEATURES = 2**31 // (127 * 128)
"""So many products of two int8 codes are certain to add up to less than an int32 holds."""
_CUDA_ROWS = 17
"""cuBLAS multiplies int8 matrices with at least so many rows, and dimensions that are multiples of 8."""


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    planes: Mapping[str, Tensor],
    scheme: Scheme,
    n: int,
    bias: Tensor | None,
) -> Tensor:
    """`[..., n]`: the codes times the weight plus the bias, accumulated in float32, rounded once to the dtype of x.

    Args:
        x: `[..., K]`, what the codes were made of; its outlier features are multiplied as they are.
        codes: as `quantize_activation` gives them.
        scales: theirs.
        planes: of an `[n, K]` weight under `scheme`, whose activation is that of the codes.
        scheme: how the weight is stored.
        n: rows of the weight.
        bias: `[n]` or None.
    """
    activation = scheme.activation
    assert activation is not None
    k = x.shape[-1]
    if (done := native.linear_on_codes(codes, scales, planes, scheme, n, bias, x.dtype)) is not None:
        return done
    if _multiplies_integers(scheme, x.device, n, k):
        y = _integer_product(x, codes, scales, planes, activation)
    else:
        values = dequantize_activation(codes, scales, activation)
        if activation.threshold:
            values = torch.where(outlier_features(x, activation.threshold), x.to(torch.float32), values)
        y = F.linear(values, dequantize(planes, scheme, n, k))
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def _multiplies_integers(scheme: Scheme, device: torch.device, n: int, k: int) -> bool:
    """Whether both sides are int8 with scales that are constant along K, and the device has a fast integer product."""
    activation = scheme.activation
    assert activation is not None
    plain = scheme.element == "int8" and scheme.zero == "none" and scheme.block in (ROW, TENSOR) and not scheme.columns
    single = scheme.scale in FLOAT_SCALES and scheme.outer is None and not scheme.double
    # K = 1: torch 2.11 to 2.13 take a weight of one column for a row.
    if not (plain and single) or activation.element != "int8" or activation.group or not 1 < k <= _MOST_FEATURES:
        return False
    if device.type == "cuda":
        # To gather outlier features, the host would have to wait for the device.
        return not activation.threshold and n > 0 and n % 8 == 0 and k % 8 == 0
    # Without AVX512, torch multiplies int8 matrices in a loop over scalars: slower than float32.
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _integer_product(
    x: Tensor, codes: Tensor, scales: Tensor, planes: Mapping[str, Tensor], activation: Activation
) -> Tensor:
    weight, weight_scales = planes["codes"], planes["scales"].to(torch.float32).view(-1)
    # By way of one dimension, so that strides are those of a fresh tensor: torch 2.11 to 2.13 take one row with the
    # strides (1, 1), such as a column transposed, for a column.
    flat = codes.reshape(-1).view(-1, codes.shape[-1])
    y = _integer_matmul(flat, weight) * (scales.reshape(-1, 1) * weight_scales)
    if activation.threshold:
        at = outlier_features(x, activation.threshold).nonzero().view(-1)
        if at.numel():
            columns = weight[:, at].to(torch.float32) * weight_scales.unsqueeze(-1)
            y += F.linear(x.reshape(flat.shape)[:, at].to(torch.float32), columns)
    return y.view(*x.shape[:-1], weight.shape[0])


def _integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 matrices, int32, exact. `a` must be contiguous."""
    rows = a.shape[0]
    if a.device.type == "cuda" and rows < _CUDA_ROWS:
        a = F.pad(a, (0, 0, 0, _CUDA_ROWS - rows))
    result: Tensor = torch.ops.aten._int_mm.default(a, b.t())
    return result[:rows]
