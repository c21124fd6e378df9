"""The op of a mixture of experts in a quantized graph: `fxquant::experts`.

One projection of all experts, for every token and each of its slots. Its gradients are ops too, since which expert a
row meets is data: `fxquant::experts_input_grad` and `fxquant::experts_weight_grad`.

`fxquant::gated_experts` is a whole layer, for a few tokens: its steps take so little time that what is between counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import native
from fxquant.errors import ModelError
from fxquant.expert_matmul import PLAIN, Blocks, ExpertWeights, input_gradient, multiply_experts, weight_gradient
from fxquant.lowering import register_experts
from fxquant.op_registration import define, with_autocast
from fxquant.ops import ABI
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
    hit make no difference, and their codes are not read. All shapes follow from those of x and ids, and the host never
    waits for the device.

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
    register_experts()
    return x.new_empty(*ids.shape, n)


@torch.library.custom_op("fxquant::expert_blocks", mutates_args=())
def expert_blocks(ids: Tensor, experts: int, size: int, abi: int) -> tuple[Tensor, Tensor, Tensor]:
    """How slots are laid out in blocks of rows that have one expert each, for kernels that multiply block by block.

    Args:
        ids: int64 `[T, k]`.
        experts: how many there are.
        size: rows of a block.
        abi: `ABI`.

    Returns:
        Of `T * k // size + experts` blocks the expert, -1 where nobody needs the block; of each of their rows the slot
        that it is, counted through all tokens; of each slot its row. What is none of these is 0.
    """
    if not ids.numel():
        return ids.new_full((experts,), -1), ids.new_zeros(experts * size), ids.new_zeros(0)
    blocks = Blocks.of(ids, experts, size, ids.numel() // size + experts)
    places, rows = blocks.places.view(-1), len(blocks.owners) * size
    return blocks.owners, blocks.slots, torch.where(places < rows, places, 0)


@expert_blocks.register_fake
def _(ids: Tensor, experts: int, size: int, abi: int) -> tuple[Tensor, Tensor, Tensor]:
    count = ids.numel() // size + experts
    return ids.new_empty(count), ids.new_empty(count * size), ids.new_empty(ids.numel())


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
    scheme, names, wanted = _wanted(spelling, int(n), int(k), int(experts))
    if [plane.shape for plane in planes] != wanted:
        raise ModelError(
            f"fxquant::experts got planes that are not {spelling or 'weights'} of {experts} experts [N={n}, K={k}], K "
            f"being the input's last dimension\n  shapes: {[tuple(plane.shape) for plane in planes]}\n"
            f"  expected: {wanted} ({', '.join(names)})"
        )
    if scheme and scheme.activation and scheme.activation.group and k % scheme.activation.group:
        raise ModelError(
            f"an input of K={k} features does not consist of the groups of {scheme.activation} activations"
        )
    return ExpertWeights(dict(zip(names, planes, strict=True)), scheme, n, k, experts)


@functools.lru_cache(maxsize=1024)
def _wanted(
    spelling: str, n: int, k: int, experts: int
) -> tuple[Scheme | None, tuple[str, ...], list[tuple[int, ...]]]:
    """The scheme, the names of its planes, and their shapes."""
    scheme = Scheme.parse(spelling) if spelling != PLAIN else None
    shapes = {name: spec.shape for name, spec in scheme.planes(n, k).items()} if scheme else {"weight": (n, k)}
    return scheme, tuple(shapes), [(experts, *shape) for shape in shapes.values()]


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

_LIBRARY = torch.library.Library("fxquant", "FRAGMENT")


def gated_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_scheme: str,
    second_scheme: str,
    inner: int,
    experts: int,
    abi: int,
) -> Tensor:
    """`y[t]`: over the slots j, the sum of `weights[t, j] * (silu(gate) * up) @ second[ids[t, j]].T`.

    `gate` and `up` are the halves of `x[t] @ first[ids[t, j]].T`. A slot whose id is no expert adds nothing. Products
    are those of `fxquant::experts`, to the same bounds, the sum is in float32 at least, and what is between them is in
    the dtype of x or, where a CPU runs compiled kernels, in float32. It has no gradient.

    Args:
        x: `[T, K]`, any floating dtype.
        ids: int64 `[T, k]`.
        weights: `[T, k]`, any floating dtype.
        first: the planes of its scheme for `[2 * inner, K]` weights, in the order of `Scheme.planes`, each
            `[experts, ...]`.
        second: those of its scheme for `[K, inner]` weights.
        first_scheme: a spelling, or `PLAIN`.
        second_scheme: likewise.
        inner: features between both products.
        experts: how many there are.
        abi: `ABI`.

    Returns:
        `[T, K]` in the dtype of x.

    Raises:
        ModelError: when planes, ids or weights are not of the shapes that K, inner and the schemes demand, or when a
            gradient is wanted.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        raise ModelError(
            "fxquant::gated_experts has no gradient; run it under torch.no_grad(), or use fxquant::experts"
        )
    one, two = _both(x, ids, weights, first, second, first_scheme, second_scheme, inner, experts)
    if one.scheme is not None and two.scheme is not None:
        pairs = (one.planes, one.scheme), (two.planes, two.scheme)
        y = native.gated_experts(x, ids, weights, *pairs, inner, experts)
        if y is not None:
            return y
    gate, up = multiply_experts(x, ids, one, None).chunk(2, -1)
    outputs = multiply_experts(F.silu(gate) * up, ids, two, None)
    known = weights.masked_fill((ids < 0) | (ids >= experts), 0)
    return (outputs * known.unsqueeze(-1)).sum(1).to(x.dtype)


def _both(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_scheme: str,
    second_scheme: str,
    inner: int,
    experts: int,
) -> tuple[ExpertWeights, ExpertWeights]:
    if x.dim() != 2 or weights.shape != ids.shape:
        raise ModelError(
            f"fxquant::gated_experts takes x [T, K], ids [T, k] and weights [T, k]\n"
            f"  got: x {list(x.shape)}, ids {list(ids.shape)} and weights {list(weights.shape)}"
        )
    one = _checked(x, ids, first, [], first_scheme, 2 * inner, experts)
    return one, _weights(second, second_scheme, x.shape[-1], inner, experts)


def _gated_experts_fake(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_scheme: str,
    second_scheme: str,
    inner: int,
    experts: int,
    abi: int,
) -> Tensor:
    _both(x, ids, weights, first, second, first_scheme, second_scheme, inner, experts)
    register_experts()
    return x.new_empty(x.shape)


define(_LIBRARY, gated_experts, _gated_experts_fake)

__all__ = ["ABI", "expert_blocks", "experts", "experts_input_grad", "experts_weight_grad", "gated_experts"]

for _key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
    for _name in ("experts", "experts_input_grad", "experts_weight_grad", "gated_experts"):
        _LIBRARY.impl(_name, with_autocast(getattr(torch.ops.fxquant, _name)), _key)
