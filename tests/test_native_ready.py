"""Products that start with little Python once they were computed: the same numbers, and no trust in addresses alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from random_planes import random_planes
from torch import Tensor

from fxquant import expert_ops, native
from fxquant.errors import ModelError
from fxquant.ops import ABI
from fxquant.scheme import Scheme

K, ROWS = 256, (70, 33)


pytestmark = pytest.mark.usefixtures("compiled_products")


def planes_of(spelling: str) -> list[list[Tensor]]:
    scheme = Scheme.parse(spelling)
    return [list(random_planes(scheme, n, K, seed=n).values()) for n in ROWS]


def linear(
    x: Tensor, planes: list[Tensor], biases: list[Tensor], spelling: str, rows: tuple[int, ...] = ROWS
) -> Tensor:
    with native.from_size(0):
        y: Tensor = torch.ops.fxquant.linear(x, planes, biases, spelling, list(rows), ABI)
    return y


def not_this_way(*_: Any, **__: Any) -> None:
    raise AssertionError("computed as if for the first time")


@pytest.mark.parametrize("spelling", ["int4", "nf4", "int8", "int4-g32-asym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_call_gives_the_same(spelling: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = planes_of(spelling), torch.randn(2, 3, K).to(dtype)
    bias, none = torch.randn(ROWS[0]).to(dtype), torch.empty(0, dtype=dtype)
    planes = own[0] + own[1]
    first = linear(x, planes, [bias, none], spelling)
    alone = [linear(x, own[0], [bias], spelling, ROWS[:1]), linear(x, own[1], [], spelling, ROWS[1:])]
    assert torch.equal(first, torch.cat(alone, -1))
    monkeypatch.setattr(native, "linear", not_this_way)
    assert torch.equal(linear(x, planes, [bias, none], spelling), first)
    assert torch.equal(linear(x[:1], planes, [bias, none], spelling), first[:1])
    x.zero_()  # numbers are read anew, and so are those of planes and biases
    assert torch.equal(linear(x, planes, [bias, none], spelling)[..., : ROWS[0]], bias.expand(2, 3, -1))
    bias.fill_(2)
    assert linear(x, planes, [bias, none], spelling)[..., : ROWS[0]].eq(2).all()


def test_what_is_not_the_same_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spelling, x = "int4", torch.randn(3, K)
    planes = [plane for own in planes_of(spelling) for plane in own]
    first = linear(x, planes, [], spelling)
    codes = planes[0]
    with pytest.raises(ModelError, match="planes that are not"):
        linear(x, [codes.view(-1)[: 69 * codes.shape[1]].view(69, -1), *planes[1:]], [], spelling)
    assert torch.equal(linear(x.t().contiguous().t(), planes, [], spelling), first)
    assert linear(x.double(), planes, [], spelling).dtype is torch.float64
    assert linear(x.to("meta"), [plane.to("meta") for plane in planes], [], spelling).is_meta
    assert linear(x[:0], planes, [], spelling).shape == (0, sum(ROWS))
    grown = x.clone().requires_grad_()
    linear(grown, planes, [], spelling).sum().backward()
    assert grown.grad is not None
    monkeypatch.setattr(native, "linear", not_this_way)
    with pytest.raises(AssertionError, match="first time"), native.from_size(math.inf):
        torch.ops.fxquant.linear(x, planes, [], spelling, list(ROWS), ABI)
    with pytest.raises(AssertionError, match="first time"):
        linear(x, [plane.clone() for plane in planes], [], spelling)


def test_a_layer_of_experts_starts_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    count, inner, scheme = 4, 128, Scheme.parse("int4")
    first = [torch.stack([p] * count) for p in random_planes(scheme, 2 * inner, K).values()]
    second = [torch.stack([p] * count) for p in random_planes(scheme, K, inner).values()]
    x, ids, weights = torch.randn(3, K), torch.tensor([[0, 1], [3, -1], [2, 4]]), torch.rand(3, 2)

    def layer(x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> Tensor:
        with native.from_size(0):
            y: Tensor = torch.ops.fxquant.gated_experts(
                x, ids, weights, first, second, "int4", "int4", inner, count, expert_ops.ABI
            )
        return y

    y = layer()
    monkeypatch.setattr(native, "gated_experts", not_this_way)
    assert torch.equal(layer(), y)
    assert torch.equal(layer(x[:2], ids[:2], weights[:2]), y[:2])
    for wrong in (
        {"x": x.double()},
        {"weights": weights.double()},
        {"ids": ids.flip(1)[:, ::2].repeat(1, 2).t().contiguous().t()},
    ):
        with pytest.raises(AssertionError, match="first time"):
            layer(**wrong)
    for shape in ((2, 3, 2), (2,)):
        with pytest.raises(ModelError, match="takes x"):
            layer(x[:2], torch.zeros(shape, dtype=torch.int64), torch.rand(shape))
    with pytest.raises(ModelError, match="no gradient"):
        layer(x.clone().requires_grad_())
    with pytest.raises(ModelError, match="takes x"):
        layer(ids=ids.int())
