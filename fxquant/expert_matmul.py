"""The products of tokens and the experts that they are routed to, without any state: what `fxquant::experts` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import native
from fxquant.activation_codecs import dequantize_activation, outlier_features, quantize_activation
from fxquant.codecs import dequantize
from fxquant.plane_stacks import dequantize_stack
from fxquant.quantized_matmul import multiply
from fxquant.scheme import Scheme

PLAIN = ""
"""What stands where a scheme's spelling would, where weights are there as they are: the only plane is `weight`."""
_WEIGHTS_AT_ONCE = 1 << 26
"""So many weights are dequantized at a time where all experts are decoded in batches."""


@dataclass(frozen=True)
class ExpertWeights:
    """The weights `[E, n, k]` of one kind, stored under one scheme."""

    planes: Mapping[str, Tensor]
    """Each plane of the scheme, `[E, ...]`; without a scheme, the weights themselves, called `weight`."""
    scheme: Scheme | None
    n: int
    k: int
    experts: int

    def of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights `[S, n, k]` of the experts `ids` `[S]`; reads the planes of these and of no others."""
        return replace(self, planes={name: p.index_select(0, ids) for name, p in self.planes.items()}).all(dtype)

    def all(self, dtype: torch.dtype) -> Tensor:
        """All weights."""
        if self.scheme is None:
            return self.planes["weight"].to(dtype)
        return dequantize_stack(self.planes, self.scheme, self.n, self.k, dtype)

    def one(self, e: int, dtype: torch.dtype) -> Tensor:
        """The weight `[n, k]` of one expert."""
        if self.scheme is None:
            return self.planes["weight"][e].to(dtype)
        return dequantize(self.planes_of(e), self.scheme, self.n, self.k, dtype)

    def planes_of(self, e: int) -> dict[str, Tensor]:
        """The planes of one expert."""
        return {name: plane[e] for name, plane in self.planes.items()}


def multiply_experts(x: Tensor, ids: Tensor, weights: ExpertWeights, bias: Tensor | None) -> Tensor:
    """`y[t, j] = x[t, j] @ W[ids[t, j]].T + bias[ids[t, j]]`, see `fxquant::experts`.

    Args:
        x: `[T, K]`, one row for all slots of a token, or `[T, k, K]`.
        ids: int64 `[T, k]`.
        weights: `[E, n, K]`.
        bias: `[E, n]` or None.

    Returns:
        `[T, k, n]` in the dtype of x.
    """
    activation = weights.scheme.activation if weights.scheme else None
    if activation is None:
        return _product(x, ids, weights, bias).to(x.dtype)
    bias = None if bias is None else bias.to(torch.float32)
    if x.device.type == "cpu" and not activation.static and not activation.threshold:
        return _on_codes(x, ids, weights, bias)
    return _product(_rounded(x, ids, weights), ids, weights, bias).to(x.dtype)


def input_gradient(grad: Tensor, ids: Tensor, weights: ExpertWeights) -> Tensor:
    """`[T, k, K]`: `grad[t, j] @ W[ids[t, j]]`."""
    run = _by_expert if grad.device.type == "cpu" else in_blocks
    return run(grad, ids, weights, None, transposed=True)


def weight_gradient(grad: Tensor, x: Tensor, ids: Tensor, experts: int) -> Tensor:
    """`[E, n, K]`: of each expert the sum of the products of `grad` `[T, k, n]` and x over its slots."""
    n, k = grad.shape[-1], x.shape[-1]
    if x.device.type == "cpu":
        result = grad.new_zeros(experts, n, k)
        for e, slots, rows in _hits(x, ids, experts):
            result[e] = grad.reshape(-1, n)[slots].t() @ x.reshape(-1, k)[rows]
        return result
    return weight_gradient_in_blocks(grad, x, ids, experts)


def weight_gradient_in_blocks(grad: Tensor, x: Tensor, ids: Tensor, experts: int) -> Tensor:
    """As `weight_gradient`, in the way of `in_blocks`."""
    n, k = grad.shape[-1], x.shape[-1]
    result = grad.new_zeros(experts, n, k)
    if not ids.numel() or not experts:
        return result
    blocks, size = Blocks.of(ids, experts), max(_WEIGHTS_AT_ONCE // max(n * k, 1), 1)
    pieces = zip(blocks.gather(grad).split(size), blocks.gather(x).split(size), blocks.read.split(size), strict=True)
    for left, right, of in pieces:
        result.index_add_(0, of, torch.bmm(left.transpose(1, 2), right))
    return result


def _rounded(x: Tensor, ids: Tensor, weights: ExpertWeights) -> Tensor:
    """What codes and scales of x stand for, float32: `[T, k, K]` where each expert has an input scale of its own."""
    scheme = weights.scheme
    assert scheme is not None
    activation = scheme.activation
    assert activation is not None
    if activation.static:
        x = x.unsqueeze(1).expand(*ids.shape, x.shape[-1]) if x.dim() == 2 else x
        scales = weights.planes["input_scale"][ids.clamp(0, weights.experts - 1)]
        return dequantize_activation(*quantize_activation(x, activation, scales), activation)
    values = dequantize_activation(*quantize_activation(x, activation), activation)
    if activation.threshold:
        values = torch.where(outlier_features(x, activation.threshold), x.to(torch.float32), values)
    return values


def _product(x: Tensor, ids: Tensor, weights: ExpertWeights, bias: Tensor | None) -> Tensor:
    # On a CPU a look at which experts are hit costs nothing; elsewhere the host would have to wait for the device.
    if x.device.type != "cpu":
        return in_blocks(x, ids, weights, bias)
    scheme = weights.scheme
    y = None if scheme is None else native.experts(x, ids, weights.planes, scheme, weights.n, bias)
    return _by_expert(x, ids, weights, bias) if y is None else y


def _hits(x: Tensor, ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that is hit, its slots as an index into `ids`, flat, and the rows of x, flat, that go there."""
    flat, per_row = ids.reshape(-1), ids.shape[1] if x.dim() == 2 else 1
    order = flat.argsort(stable=True)
    hit, counts = flat[order].unique_consecutive(return_counts=True)
    for e, slots in zip(hit.tolist(), order.split(counts.tolist()), strict=True):
        if 0 <= e < experts:
            yield e, slots, slots // per_row


def _by_expert(
    x: Tensor, ids: Tensor, weights: ExpertWeights, bias: Tensor | None, *, transposed: bool = False
) -> Tensor:
    rows_of_x, n = x.reshape(-1, x.shape[-1]), weights.k if transposed else weights.n
    y = x.new_zeros(ids.numel(), n)
    for e, slots, rows in _hits(x, ids, weights.experts):
        if transposed:
            y[slots] = rows_of_x[rows] @ weights.one(e, x.dtype)
        else:
            y[slots] = _by_one(rows_of_x[rows], e, weights, None if bias is None else bias[e])
    return y.view(*ids.shape, n)


def _by_one(x: Tensor, e: int, weights: ExpertWeights, bias: Tensor | None) -> Tensor:
    """The product with one expert: its weight is not decoded first where x has few rows."""
    scheme = weights.scheme
    y = None if scheme is None else native.linear(x, weights.planes_of(e), scheme, weights.n, bias)
    return F.linear(x, weights.one(e, x.dtype), None if bias is None else bias.to(x.dtype)) if y is None else y


def _on_codes(x: Tensor, ids: Tensor, weights: ExpertWeights, bias: Tensor | None) -> Tensor:
    scheme = weights.scheme
    assert scheme is not None
    assert scheme.activation is not None
    rows_of_x, y = x.reshape(-1, x.shape[-1]), x.new_zeros(ids.numel(), weights.n)
    codes, scales = quantize_activation(rows_of_x, scheme.activation)
    for e, slots, rows in _hits(x, ids, weights.experts):
        own = None if bias is None else bias[e]
        y[slots] = multiply(rows_of_x[rows], codes[rows], scales[rows], weights.planes_of(e), scheme, weights.n, own)
    return y.view(*ids.shape, weights.n)


def in_blocks(
    x: Tensor, ids: Tensor, weights: ExpertWeights, bias: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """As `multiply_experts`, with shapes that do not depend on where tokens go: the host never waits for the device.

    Slots are sorted by expert and laid out in blocks of equal size, each for one expert. The planes of the experts of
    all blocks are gathered, dequantized, and multiplied in one batch. While there are no more slots than experts, a
    block is a slot; with more, a block has room for the mean number of slots, or a little more. A block that is left
    over, since shapes must be prepared for the worst, has an expert that is read anyway.
    """
    n = weights.k if transposed else weights.n
    y = x.new_zeros(*ids.shape, n)
    if not y.numel() or not weights.experts:
        return y
    blocks = Blocks.of(ids, weights.experts)
    rows = blocks.gather(x)
    products, size = [], max(_WEIGHTS_AT_ONCE // max(weights.n * weights.k, 1), 1)
    for some, of in zip(rows.split(size), blocks.read.split(size), strict=True):
        w = weights.of(of, x.dtype)
        w = w if transposed else w.transpose(1, 2)
        products.append(
            torch.bmm(some, w) if bias is None else torch.baddbmm(bias[of].to(x.dtype).unsqueeze(1), some, w)
        )
    flat = torch.cat(products).flatten(0, 1)
    found = flat.index_select(0, blocks.places.view(-1).clamp(max=len(flat) - 1)).view(*ids.shape, n)
    return torch.where(_present(ids, weights.experts).unsqueeze(-1), found, y)


def _present(ids: Tensor, experts: int) -> Tensor:
    return (ids >= 0) & (ids < experts)


@dataclass(frozen=True)
class Blocks:
    """Where each slot stands in blocks of `size` rows that have one expert each."""

    size: int
    owners: Tensor
    """`[blocks]`: their experts; of a block that nobody needs, -1."""
    places: Tensor
    """`[T, k]`: the row of each slot, counted through all blocks; of slots without an expert, one behind the last."""

    @classmethod
    def of(cls, ids: Tensor, experts: int, size: int = 0, count: int = 0) -> Blocks:
        """Blocks for the slots of `ids`, which are not empty.

        Args:
            ids: `[T, k]`.
            experts: how many there are.
            size: of a block; 0: 1 for up to as many slots as experts, else the mean of slots or a little more.
            count: of blocks; 0: as few as suffice wherever tokens go.
        """
        ids = ids.contiguous()
        slots, present = ids.numel(), _present(ids, experts)
        size = size or 1 << max(-(-slots // experts) - 1, 0).bit_length()
        flat = torch.where(present, ids, experts).view(-1)
        if size == 1 and not count:
            every = torch.arange(slots, device=ids.device).view(ids.shape)
            return cls(1, torch.where(flat < experts, flat, -1), torch.where(present, every, slots))
        ordered, order = flat.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=ids.device))
        ends = ((starts.diff() + size - 1) // size).cumsum(0)
        first = torch.cat((ends.new_zeros(1), ends))
        behind = torch.arange(slots, device=ids.device) - starts[ordered]
        places = torch.empty_like(order).scatter_(0, order, first[ordered] * size + behind).view(ids.shape)
        count = count or slots // size + min(experts, slots)
        owners = torch.searchsorted(ends, torch.arange(count, device=ids.device), right=True)
        return cls(size, torch.where(owners < experts, owners, -1), torch.where(present, places, count * size))

    @property
    def read(self) -> Tensor:
        """`[blocks]`: the owner, and for blocks that nobody needs, an expert that is read anyway."""
        return torch.where(self.owners < 0, self.owners.amax().clamp(min=0), self.owners)

    @property
    def slots(self) -> Tensor:
        """`[blocks * size]`: the slot, counted through all tokens, that has a row; 0 for rows that nobody needs."""
        every = torch.arange(self.places.numel(), device=self.places.device)
        rows = every.new_zeros(len(self.owners) * self.size + 1)
        return rows.index_copy_(0, self.places.view(-1), every)[:-1]

    def gather(self, x: Tensor) -> Tensor:
        """The rows of x in blocks, `[blocks, size, K]`; rows that nobody needs are zeros."""
        each = x.unsqueeze(1).expand(*self.places.shape, x.shape[-1]) if x.dim() == 2 else x
        rows = x.new_zeros(len(self.owners) * self.size + 1, x.shape[-1])
        rows.index_copy_(0, self.places.view(-1), each.reshape(-1, x.shape[-1]))
        return rows[:-1].view(len(self.owners), self.size, -1)
