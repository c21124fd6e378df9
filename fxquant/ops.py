"""The ops that a quantized graph holds: `fxquant::linear` and `fxquant::dequantize`.

One op serves every scheme: the planes are plain tensors, the scheme travels as its spelling. All of it is visible to
`torch.compile` and `torch.export`: a fake, an eager implementation, autograd and autocast.

Where a scheme quantizes its input too, `fxquant::linear` is two steps, `fxquant::quantize_activation` and
`fxquant::linear_on_codes`, which are ops as well: linears that read one input can share the first.

An op over several weights, `rows = [n1, n2, ...]`, is the same computation once for siblings (q/k/v, gate/up) that read
one input; its result is theirs side by side. Each sibling keeps its own planes, so nothing is stored twice and
`.to()`, `deepcopy`, `state_dict` and `device_map` need to know nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import native
from fxquant.activation_codecs import CODE_DTYPES
from fxquant.activation_codecs import quantize_activation as encode_activation
from fxquant.codecs import dequantize as decode
from fxquant.lowering import register as register_lowering
from fxquant.op_arguments import check_biases, check_codes, checked_activation, planes_by_weight, scales_shape
from fxquant.op_registration import define, with_autocast
from fxquant.quantized_matmul import multiply
from fxquant.scheme import Scheme

ABI = 6
"""Number of the ops' contract, an argument of every op and so a part of every compile-cache key.

Inductor's cache does not know the source of our kernels: raise this when a kernel, its packing or its meaning changes.
"""


_LIBRARY = torch.library.Library("fxquant", "FRAGMENT")


def _bias(biases: Sequence[Tensor], i: int, dtype: torch.dtype) -> Tensor | None:
    # An empty tensor stands for "no bias" beside siblings that have one: lists of optional tensors have no autograd.
    return biases[i].to(dtype) if biases and biases[i].numel() else None


def linear(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    """`x @ W.T + bias`, accumulated in float32, or more exactly, rounded once to the dtype of x.

    Under a scheme that leaves activations alone W is `dequantize(planes)` in the dtype of x, or in float32 where a CPU
    runs compiled kernels, see `fxquant.native.linear`, or Inductor compiles the call for a GPU, see `fxquant.lowering`.
    Under one that quantizes them, x is what its codes and scales stand for, float32, see
    `fxquant.activation_codecs.quantize_activation`: a scale per token, per group of features or the plane
    `input_scale` (which clips); features that the scheme counts as outliers are x itself. W is dequantized to
    float32 there. Against the same sum in exact arithmetic, y is off by less than `(u + (K + 8) * 2**-24) * (|x| @
    |W|.T + |bias|)`, u being half the distance of 1 to the next larger number in the dtype of x, unless it overflows or
    the scales underflow. Products of int8 codes are added up as integers, exactly, where the device does that faster;
    those of float8 codes by the matrix units of GPUs that have them, whose sums may keep fewer bits than float32. Where
    Inductor compiles the call for a GPU, a code may be the second nearest, if x is next to the middle between two.

    The gradient of x is `grad @ W`, as if x were not quantized (the straight-through estimator, arXiv 1308.3432).

    Args:
        x: `[..., K]`, any floating dtype.
        planes: the planes of every weight in turn, each in the order of `Scheme.planes`.
        biases: nothing, or one `[N]` per weight; an empty tensor for a weight without bias.
        scheme: the spelling of the scheme that all weights share.
        rows: N of every weight. Weights with an `input_scale` of their own are multiplied with x at that scale.
        abi: `ABI`.

    Returns:
        `[..., sum(rows)]` in the dtype of x.

    Raises:
        ModelError: when planes are not those of the scheme for these N and K, or biases not those of the weights.
    """
    k, parsed = x.shape[-1], Scheme.parse(scheme)
    check_biases(biases, rows)
    parts = planes_by_weight(planes, rows, scheme, k)
    activation = parsed.activation
    bias_dtype = x.dtype if activation is None else torch.float32
    compiled = [
        native.linear(x, part, parsed, n, _bias(biases, i, bias_dtype))
        for i, (part, n) in enumerate(zip(parts, rows, strict=True))
    ]
    outputs = [y for y in compiled if y is not None]
    if len(outputs) == len(rows):
        native.remember_linear(x, biases, parsed, rows, parts)
        return _side_by_side(outputs)
    if activation is None:
        return _side_by_side(
            [
                _on_floats(x, part, parsed, n, _bias(biases, i, x.dtype)) if y is None else y
                for i, (y, part, n) in enumerate(zip(compiled, parts, rows, strict=True))
            ]
        )
    if not activation.static:
        return _on_codes(x, *encode_activation(x, activation), parts, biases, parsed, rows)
    outputs = [
        _on_codes(x, *encode_activation(x, activation, part["input_scale"]), [part], biases[i : i + 1], parsed, [n])
        for i, (part, n) in enumerate(zip(parts, rows, strict=True))
    ]
    return _side_by_side(outputs)


def _on_floats(x: Tensor, planes: dict[str, Tensor], scheme: Scheme, n: int, bias: Tensor | None) -> Tensor:
    return F.linear(x, decode(planes, scheme, n, x.shape[-1], x.dtype), bias)


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _on_codes(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    parts: list[dict[str, Tensor]],
    biases: Sequence[Tensor],
    scheme: Scheme,
    rows: Sequence[int],
) -> Tensor:
    outputs = [
        multiply(x, codes, scales, part, scheme, n, _bias(biases, i, torch.float32))
        for i, (part, n) in enumerate(zip(parts, rows, strict=True))
    ]
    return _side_by_side(outputs)


def _linear_fake(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    check_biases(biases, rows)
    planes_by_weight(planes, rows, scheme, x.shape[-1])
    register_lowering()
    return x.new_empty(*x.shape[:-1], sum(rows))


define(_LIBRARY, linear, _linear_fake)


def _save(ctx: Any, x: Tensor, planes: Any, biases: Any, scheme: str, rows: Sequence[int], abi: int) -> None:
    ctx.save_for_backward(*planes)
    ctx.k, ctx.scheme, ctx.rows, ctx.abi = x.shape[-1], scheme, list(rows), abi
    ctx.biases = [(b.numel() > 0, b.requires_grad, b.dtype) for b in biases]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[None], list[Tensor | None]]:
    """Of x, of the planes, which have none, and of the biases."""
    planes, per_weight = ctx.saved_tensors, len(ctx.saved_tensors) // len(ctx.rows)
    pieces = grad.split(ctx.rows, -1)
    grad_x = None
    if ctx.needs_input_grad[0]:
        for i, (piece, n) in enumerate(zip(pieces, ctx.rows, strict=True)):
            own = list(planes[i * per_weight : (i + 1) * per_weight])
            weight = dequantize(own, ctx.scheme, n, ctx.k, piece.dtype, ctx.abi)
            grad_x = piece @ weight if grad_x is None else grad_x + piece @ weight
    grad_biases = [
        pieces[i].unsqueeze(0).flatten(0, -2).sum(0).to(dtype) if has and wanted else None
        for i, (has, wanted, dtype) in enumerate(ctx.biases)
    ]
    return grad_x, [None] * len(planes), grad_biases


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, *inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_gradients(ctx, grad), None, None, None)


torch.library.register_autograd("fxquant::linear", _linear_backward, setup_context=_save_linear, lib=_LIBRARY)


@torch.library.custom_op("fxquant::quantize_activation", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def quantize_activation(x: Tensor, activation: str, input_scale: Tensor | None, abi: int) -> tuple[Tensor, Tensor]:
    """Codes `[..., K]` and scales of x `[..., K]`, see `fxquant.activation_codecs.quantize_activation`.

    No gradient goes through: `fxquant::linear_on_codes` gives it to x.

    Args:
        x: `[..., K]`, any floating dtype.
        activation: the spelling of an activation.
        input_scale: float32 `[1]`, of static activations and of no others.
        abi: `ABI`.

    Raises:
        SchemeError: when there is no such activation.
        ModelError: when K does not consist of whole groups, or there is an input scale where none is wanted, or none.
    """
    return encode_activation(x, checked_activation(activation, x.shape[-1], input_scale), input_scale)


@quantize_activation.register_fake
def _(x: Tensor, activation: str, input_scale: Tensor | None, abi: int) -> tuple[Tensor, Tensor]:
    found = checked_activation(activation, x.shape[-1], input_scale)
    register_lowering()
    scales = x.new_empty(scales_shape(found, x.shape), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=CODE_DTYPES[found.element]), scales


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pass


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
    return None, None, None, None


quantize_activation.register_autograd(_no_gradient, setup_context=_save_nothing)


@torch.library.custom_op("fxquant::linear_on_codes", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def linear_on_codes(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    planes: Sequence[Tensor],
    biases: Sequence[Tensor],
    scheme: str,
    rows: Sequence[int],
    abi: int,
) -> Tensor:
    """`fxquant::linear` of an x whose codes and scales are there already; equal to it bit for bit.

    Args:
        x: what the codes were made of. It gives the result its dtype, takes the gradient, and outliers are read in it.
        codes: from `fxquant::quantize_activation(x, ...)`, for the activation of the scheme.
        scales: from there. An `input_scale` among the planes is not looked at.
        planes: as for `fxquant::linear`.
        biases: likewise.
        scheme: likewise; it must quantize activations.
        rows: likewise.
        abi: `ABI`.

    Raises:
        ModelError: when planes, codes or scales are not those of the scheme for these N and this x, or biases not those
            of the weights.
    """
    check_codes(x, codes, scales, scheme)
    check_biases(biases, rows)
    parts = planes_by_weight(planes, rows, scheme, x.shape[-1])
    return _on_codes(x, codes, scales, parts, biases, Scheme.parse(scheme), rows)


@linear_on_codes.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    planes: Sequence[Tensor],
    biases: Sequence[Tensor],
    scheme: str,
    rows: Sequence[int],
    abi: int,
) -> Tensor:
    check_codes(x, codes, scales, scheme)
    check_biases(biases, rows)
    planes_by_weight(planes, rows, scheme, x.shape[-1])
    register_lowering()
    return x.new_empty(*x.shape[:-1], sum(rows))


def _save_on_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, *rest = inputs
    _save(ctx, x, *rest)


def _on_codes_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_planes, grad_biases = _gradients(ctx, grad)
    return grad_x, None, None, grad_planes, grad_biases, None, None, None


linear_on_codes.register_autograd(_on_codes_backward, setup_context=_save_on_codes)


@torch.library.custom_op("fxquant::dequantize", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def dequantize(planes: Sequence[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype, abi: int) -> Tensor:
    """The `[n, k]` weight that the planes of one weight stand for, computed in float32 and rounded to `dtype`.

    Raises:
        ModelError: when the planes are not those of the scheme for this n and k.
    """
    (part,) = planes_by_weight(planes, [n], scheme, k)
    return decode(part, Scheme.parse(scheme), n, k, dtype)


@dequantize.register_fake
def _(planes: Sequence[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype, abi: int) -> Tensor:
    planes_by_weight(planes, [n], scheme, k)
    return planes[0].new_empty(n, k, dtype=dtype)


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
    for _name in ("linear", "quantize_activation", "linear_on_codes"):
        _LIBRARY.impl(_name, with_autocast(getattr(torch.ops.fxquant, _name)), _key)
