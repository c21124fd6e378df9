"""The ops that a quantized graph holds: `fxquant::linear` and `fxquant::dequantize`.

One op serves every scheme: the planes are plain tensors, the scheme travels as its spelling. All of it is visible to
`torch.compile` and `torch.export`: a fake, an eager implementation, autograd and autocast.

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

from fxquant.codecs import dequantize as decode
from fxquant.errors import ModelError
from fxquant.scheme import Scheme

ABI = 1
"""Number of the ops' contract, an argument of every op and so a part of every compile-cache key.

Inductor's cache does not know the source of our kernels: raise this when a kernel, its packing or its meaning changes.
"""


def _split(planes: Sequence[Tensor], rows: Sequence[int], spelling: str, k: int) -> list[dict[str, Tensor]]:
    """The planes of each weight by name; raises ModelError where their shapes are not what the scheme demands."""
    scheme, parts = Scheme.parse(spelling), []
    per_weight = len(planes) // max(len(rows), 1)
    for i, n in enumerate(rows):
        own, specs = planes[i * per_weight : (i + 1) * per_weight], scheme.planes(n, k)
        shapes, wanted = [tuple(p.shape) for p in own], [spec.shape for spec in specs.values()]
        if shapes != wanted:
            raise ModelError(
                f"fxquant::linear got planes that are not {spelling} of an [N={n}, K={k}] weight, K being the input's "
                f"last dimension\n  shapes: {shapes}\n  expected: {wanted} ({', '.join(specs)})"
            )
        parts.append(dict(zip(specs, own, strict=True)))
    return parts


def _bias(biases: Sequence[Tensor], i: int, dtype: torch.dtype) -> Tensor | None:
    # An empty tensor stands for "no bias" beside siblings that have one: lists of optional tensors have no autograd.
    return biases[i].to(dtype) if biases and biases[i].numel() else None


@torch.library.custom_op("fxquant::linear", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def linear(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    """`x @ dequantize(planes).T + bias`, accumulated in float32, rounded once to the dtype of x.

    Args:
        x: `[..., K]`, any floating dtype; the weight is dequantized to this dtype.
        planes: the planes of every weight in turn, each in the order of `Scheme.planes`.
        biases: nothing, or one `[N]` per weight; an empty tensor for a weight without bias.
        scheme: the spelling of the scheme that all weights share.
        rows: N of every weight.
        abi: `ABI`.

    Returns:
        `[..., sum(rows)]` in the dtype of x.

    Raises:
        ModelError: when the planes are not those of the scheme for these N and K.
    """
    k = x.shape[-1]
    parts = _split(planes, rows, scheme, k)
    parsed = Scheme.parse(scheme)
    outputs = [
        F.linear(x, decode(part, parsed, n, k, x.dtype), _bias(biases, i, x.dtype))
        for i, (part, n) in enumerate(zip(parts, rows, strict=True))
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


@linear.register_fake
def _(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    _split(planes, rows, scheme, x.shape[-1])
    return x.new_empty(*x.shape[:-1], sum(rows))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, planes, biases, scheme, rows, abi = inputs
    ctx.save_for_backward(*planes)
    ctx.k, ctx.scheme, ctx.rows, ctx.abi = x.shape[-1], scheme, list(rows), abi
    ctx.biases = [(b.numel() > 0, b.requires_grad, b.dtype) for b in biases]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    planes, per_weight = ctx.saved_tensors, len(ctx.saved_tensors) // len(ctx.rows)
    pieces = grad.split(ctx.rows, -1)
    grad_x = None
    if ctx.needs_input_grad[0]:
        for i, (piece, n) in enumerate(zip(pieces, ctx.rows, strict=True)):
            own = list(planes[i * per_weight : (i + 1) * per_weight])
            weight = dequantize(own, ctx.scheme, n, ctx.k, piece.dtype, ctx.abi)
            grad_x = piece @ weight if grad_x is None else grad_x + piece @ weight
    grad_biases = [
        pieces[i].flatten(0, -2).sum(0).to(dtype) if has and wanted else None
        for i, (has, wanted, dtype) in enumerate(ctx.biases)
    ]
    return grad_x, [None] * len(planes), grad_biases, None, None, None


linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fxquant::dequantize", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def dequantize(planes: Sequence[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype, abi: int) -> Tensor:
    """The `[n, k]` weight that the planes of one weight stand for, computed in float32 and rounded to `dtype`.

    Raises:
        ModelError: when the planes are not those of the scheme for this n and k.
    """
    (part,) = _split(planes, [n], scheme, k)
    return decode(part, Scheme.parse(scheme), n, k, dtype)


@dequantize.register_fake
def _(planes: Sequence[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype, abi: int) -> Tensor:
    _split(planes, [n], scheme, k)
    return planes[0].new_empty(n, k, dtype=dtype)


def _autocast(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    """Under autocast only x takes the lower dtype: the library's own rule would round scales and codes as well."""
    device = x.device.type
    with torch.autocast(device, enabled=False):
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        result: Tensor = torch.ops.fxquant.linear(x, planes, biases, scheme, rows, abi)
        return result


_LIBRARY = torch.library.Library("fxquant", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
    _LIBRARY.impl("linear", _autocast, _key)
