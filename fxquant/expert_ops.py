"""The op of a mixture of experts in a quantized graph: `fxquant::experts`.

One projection of all experts, for every token and each of its slots. Its gradients are ops too, since which expert a
row meets is data: `fxquant::experts_input_grad` and `fxquant::experts_weight_grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ModelError
from fxquant.expert_matmul import PLAIN, ExpertWeights, input_gradient, multiply_experts, weight_gradient
from fxquant.ops import ABI, with_autocast
from fxquant.scheme import Scheme


@torch.library.custom_op("fxquant::experts", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def experts(
    x: Tensor,
    ids: Tensor,
    planes: Sequence[Tensor],
    biases: Sequence[Tensor],
    scheme: str,
    n: int,
    experts: int,
    abi: int,
) -> Tensor:
    """`y[t, j] = x[t, j] @ W[ids[t, j]].T + bias[ids[t, j]]`; 0 where `ids[t, j]` is no expert.

    Each product is that of `fxquant::linear` with the weight of that expert, to the same bounds. Where the scheme
    counts features as outliers, they are those that reach the threshold anywhere in x. Planes of experts that are not
    hit make no difference and are not read. All shapes follow from those of x and ids, and the host never waits for the
    device.

    The gradient of x is `grad @ W`, as if x were not quantized. Biases have gradients, and weights that are there as
    they are.

    Args:
        x: `[T, K]`, one row for all slots of a token, or `[T, k, K]`, any floating dtype.
        ids: int64 `[T, k]`.
        planes: the planes of the scheme for an `[n, K]` weight in the order of `Scheme.planes`, each `[experts, ...]`.
        biases: nothing, or one `[experts, n]`.
        scheme: the spelling of the scheme that all experts share, or `PLAIN`.
        n: rows of each weight.
        experts: how many there are.
        abi: `ABI`.

    Returns:
        `[T, k, n]` in the dtype of x.

    Raises:
        ModelError: when planes, biases or ids are not of the shapes that n, K and the scheme demand.
    """
    weights = _checked(x, ids, planes, biases, scheme, n, experts)
    return multiply_experts(x, ids, weights, biases[0] if biases else None)


@experts.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    planes: Sequence[Tensor],
    biases: Sequence[Tensor],
    scheme: str,
    n: int,
    experts: int,
    abi: int,
) -> Tensor:
    _checked(x, ids, planes, biases, scheme, n, experts)
    return x.new_empty(*ids.shape, n)


@torch.library.custom_op("fxquant::experts_input_grad", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def experts_input_grad(
    grad: Tensor, ids: Tensor, planes: Sequence[Tensor], scheme: str, k: int, experts: int, abi: int
) -> Tensor:
    """`[T, k, K]`: `grad[t, j] @ W[ids[t, j]]` for `grad` `[T, k, n]`; arguments as for `fxquant::experts`.

    Raises:
        ModelError: as there.
    """
    weights = _weights(planes, scheme, grad.shape[-1], k, experts)
    return input_gradient(grad, ids, weights)


@experts_input_grad.register_fake
def _(grad: Tensor, ids: Tensor, planes: Sequence[Tensor], scheme: str, k: int, experts: int, abi: int) -> Tensor:
    _weights(planes, scheme, grad.shape[-1], k, experts)
    return grad.new_empty(*ids.shape, k)


@torch.library.custom_op("fxquant::experts_weight_grad", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def experts_weight_grad(grad: Tensor, x: Tensor, ids: Tensor, experts: int, abi: int) -> Tensor:
    """`[E, n, K]`: of each expert the sum of `grad[t, j].T @ x[t, j]` over its slots; arguments as there."""
    return weight_gradient(grad, x.to(grad.dtype), ids, experts)


@experts_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, ids: Tensor, experts: int, abi: int) -> Tensor:
    return grad.new_empty(experts, grad.shape[-1], x.shape[-1])


def _checked(
    x: Tensor, ids: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, n: int, experts: int
) -> ExpertWeights:
    slots = ids.shape if x.dim() == 3 else ids.shape[:1]
    if ids.dim() != 2 or ids.dtype != torch.int64 or x.dim() not in (2, 3) or x.shape[:-1] != slots:
        raise ModelError(
            "fxquant::experts takes x [T, K] or [T, k, K] and int64 ids [T, k]\n"
            f"  got: x {list(x.shape)} and {ids.dtype} ids {list(ids.shape)}"
        )
    if len(biases) > 1 or any(tuple(bias.shape) != (experts, n) for bias in biases):
        raise ModelError(
            f"fxquant::experts takes one bias for all experts, [{experts}, {n}], or none\n"
            f"  got: {[list(bias.shape) for bias in biases]}"
        )
    return _weights(planes, scheme, n, x.shape[-1], experts)


def _weights(planes: Sequence[Tensor], spelling: str, n: int, k: int, experts: int) -> ExpertWeights:
    scheme = Scheme.parse(spelling) if spelling != PLAIN else None
    shapes = {name: spec.shape for name, spec in scheme.planes(n, k).items()} if scheme else {"weight": (n, k)}
    wanted, found = [(experts, *shape) for shape in shapes.values()], [tuple(p.shape) for p in planes]
    if found != wanted:
        raise ModelError(
            f"fxquant::experts got planes that are not {spelling or 'weights'} of {experts} experts [N={n}, K={k}], K "
            f"being the input's last dimension\n  shapes: {found}\n  expected: {wanted} ({', '.join(shapes)})"
        )
    if scheme and scheme.activation and scheme.activation.group and k % scheme.activation.group:
        raise ModelError(
            f"an input of K={k} features does not consist of the groups of {scheme.activation} activations"
        )
    return ExpertWeights(dict(zip(shapes, planes, strict=True)), scheme, n, k, experts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, planes, biases, scheme, _, experts, abi = inputs
    plain = scheme == PLAIN and planes[0].requires_grad
    ctx.save_for_backward(ids, *planes, *([x] if plain else []))
    ctx.count, ctx.plain, ctx.shared, ctx.k = len(planes), plain, x.dim() == 2, x.shape[-1]
    ctx.scheme, ctx.experts, ctx.abi = scheme, experts, abi
    ctx.biases = [(bias.requires_grad, bias.dtype) for bias in biases]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, *saved = ctx.saved_tensors
    planes: list[Tensor] = saved[: ctx.count]
    grad_x = None
    grad_planes: list[Tensor | None] = [None] * ctx.count
    if ctx.needs_input_grad[0]:
        grad_x = experts_input_grad(grad, ids, planes, ctx.scheme, ctx.k, ctx.experts, ctx.abi)
        grad_x = grad_x.sum(1) if ctx.shared else grad_x
    if ctx.plain:
        grad_planes = [experts_weight_grad(grad, saved[-1], ids, ctx.experts, ctx.abi).to(planes[0].dtype)]
    grad_biases = [_bias_gradient(grad, ids, ctx.experts).to(dtype) if wanted else None for wanted, dtype in ctx.biases]
    return grad_x, None, grad_planes, grad_biases, None, None, None, None


def _bias_gradient(grad: Tensor, ids: Tensor, experts: int) -> Tensor:
    """`[E, n]`: of each expert the sum over its slots."""
    owners = torch.where((ids >= 0) & (ids < experts), ids, experts).reshape(-1)
    sums = grad.new_zeros(experts + 1, grad.shape[-1])
    return sums.index_add(0, owners, grad.reshape(-1, grad.shape[-1]))[:-1]


experts.register_autograd(_backward, setup_context=_save)

__all__ = ["ABI", "experts", "experts_input_grad", "experts_weight_grad"]

_LIBRARY = torch.library.Library("fxquant", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
    for _name in ("experts", "experts_input_grad", "experts_weight_grad"):
        _LIBRARY.impl(_name, with_autocast(getattr(torch.ops.fxquant, _name)), _key)
