"""The product of an input that is codes and a weight that is planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import native
from fxquant.activation_codecs import dequantize_activation, outlier_features
from fxquant.codecs import dequantize
from fxquant.lowering.dispatch import CODE_MULTIPLES, FLOAT8_CAPABILITY
from fxquant.scheme import Activation, Scheme

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
    matmul = _matmul_of_codes(scheme, x.device, n, k)
    if matmul is not None:
        y = _scaled_product(x, codes, scales, planes, activation, matmul)
    else:
        values = dequantize_activation(codes, scales, activation)
        if activation.threshold:
            values = torch.where(outlier_features(x, activation.threshold), x.to(torch.float32), values)
        y = F.linear(values, dequantize(planes, scheme, n, k))
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def _matmul_of_codes(scheme: Scheme, device: torch.device, n: int, k: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The device's fast product of the codes of both sides; None where it has none."""
    activation, element = scheme.activation, scheme.multiplied_codes
    assert activation is not None
    if element == "int8":
        return _integer_matmul if _multiplies_integers(activation, device, n, k) else None
    if element == "fp8":
        return _float8_matmul if _multiplies_float8(activation, device, n, k) else None
    return None


def _multiplies_integers(activation: Activation, device: torch.device, n: int, k: int) -> bool:
    # K = 1: torch 2.11 to 2.13 take a weight of one column for a row.
    if not 1 < k <= _MOST_FEATURES:
        return False
    if device.type == "cuda":
        # To gather outlier features, the host would have to wait for the device.
        multiple = CODE_MULTIPLES["int8"]
        return not activation.threshold and n > 0 and n % multiple == 0 and k % multiple == 0
    # Without AVX512, torch multiplies int8 matrices in a loop over scalars: slower than float32.
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiplies_float8(activation: Activation, device: torch.device, n: int, k: int) -> bool:
    # On CPUs torch's product is slower than to decode both sides.
    if device.type != "cuda" or torch.version.hip or activation.threshold:
        return False
    multiple = CODE_MULTIPLES["fp8"]
    whole = n > 0 and n % multiple == 0 and k % multiple == 0
    return whole and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def _scaled_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    planes: Mapping[str, Tensor],
    activation: Activation,
    matmul: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    weight, weight_scales = planes["codes"], planes["scales"].to(torch.float32).view(-1)
    # By way of one dimension, so that strides are those of a fresh tensor: torch 2.11 to 2.13 take one row with the
    # strides (1, 1), such as a column transposed, for a column.
    flat = codes.reshape(-1).view(-1, codes.shape[-1])
    y = matmul(flat, weight) * (scales.reshape(-1, 1) * weight_scales)
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


def _float8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of matrices of bytes that are e4m3, float32, without fast accumulation. Both must be contiguous."""
    a, b, one = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn), torch.ones((), device=a.device)
    result: Tensor = torch.ops.aten._scaled_mm.default(a, b.t(), one, one, None, None, torch.float32)
    return result
