"""Products that run without Python once they were computed: the same numbers, and no trust in addresses alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from random_planes import random_planes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant import expert_ops, native
from fxquant.errors import ModelError
from fxquant.native import known
from fxquant.ops import ABI
from fxquant.scheme import Scheme

K, ROWS = 1024, (140, 133)  # large enough for compiled code


pytestmark = pytest.mark.usefixtures("compiled_products")


def planes_of(spelling: str) -> list[list[Tensor]]:
    scheme = Scheme.parse(spelling)
    return [list(random_planes(scheme, n, K, seed=n).values()) for n in ROWS]


def linear(
    x: Tensor, planes: list[Tensor], biases: list[Tensor], spelling: str, rows: tuple[int, ...] = ROWS
) -> Tensor:
    y: Tensor = torch.ops.fxquant.linear(x, planes, biases, spelling, list(rows), ABI)
    return y


@pytest.fixture(autouse=True, scope="module")
def ops_go_first(compiled_products: None) -> None:
    """The first product of all registers the ops, and is not known afterwards."""
    linear(torch.randn(1, K), planes_of("int4")[0], [], "int4", ROWS[:1])
    layer, inputs = a_layer()
    layer(*inputs)


def not_this_way(*_: Any, **__: Any) -> None:
    raise AssertionError("computed as if for the first time")


@pytest.mark.parametrize("spelling", ["int4", "nf4", "int8", "int4-g32-asym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_call_gives_the_same(spelling: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = planes_of(spelling), torch.randn(2, 3, K).to(dtype)
    bias, none = torch.randn(ROWS[0]).to(dtype), torch.empty(0, dtype=dtype)
    planes = own[0] + own[1]
    first = linear(x, planes, [bias, none], spelling)
    assert (first.dtype, first.shape) == (dtype, (2, 3, sum(ROWS)))
    alone = [linear(x, own[0], [bias], spelling, ROWS[:1]), linear(x, own[1], [], spelling, ROWS[1:])]
    assert torch.equal(first, torch.cat(alone, -1))
    fewer = linear(x[:1], planes, [bias, none], spelling)
    monkeypatch.setattr(native, "linear", not_this_way)
    assert torch.equal(linear(x, planes, [bias, none], spelling), first)
    assert torch.equal(linear(x[:1], planes, [bias, none], spelling), fewer)
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
    assert linear(x.double(), planes, [], spelling).dtype is torch.float64
    assert linear(x.to("meta"), [plane.to("meta") for plane in planes], [], spelling).is_meta
    assert linear(x[:0], planes, [], spelling).shape == (0, sum(ROWS))
    grown = x.clone().requires_grad_()
    linear(grown, planes, [], spelling).sum().backward()
    assert grown.grad is not None
    monkeypatch.setattr(native, "linear", not_this_way)
    assert torch.equal(linear(x.t().contiguous().t(), planes, [], spelling), first)
    with torch.no_grad():
        assert torch.equal(linear(grown, planes, [], spelling), first)
    with pytest.raises(AssertionError, match="first time"), native.from_size(math.inf):
        torch.ops.fxquant.linear(x, planes, [], spelling, list(ROWS), ABI)
    with pytest.raises(AssertionError, match="first time"):
        linear(x, [plane.clone() for plane in planes], [], spelling)


def a_layer() -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A layer of experts as a function of x, ids and weights, and such inputs."""
    count, inner, scheme = 4, 128, Scheme.parse("int4")
    first = [torch.stack([p] * count) for p in random_planes(scheme, 2 * inner, K).values()]
    second = [torch.stack([p] * count) for p in random_planes(scheme, K, inner).values()]

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = torch.ops.fxquant.gated_experts(
            x, ids, weights, first, second, "int4", "int4", inner, count, expert_ops.ABI
        )
        return y

    return layer, (torch.randn(3, K), torch.tensor([[0, 1], [3, -1], [2, 4]]), torch.rand(3, 2))


def test_a_layer_of_experts_starts_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (x, ids, weights) = a_layer()
    y = layer(x, ids, weights)
    monkeypatch.setattr(native, "gated_experts", not_this_way)
    assert torch.equal(layer(x, ids, weights), y)
    assert torch.equal(layer(x[:2], ids[:2], weights[:2]), y[:2])
    assert torch.equal(layer(*(t.t().contiguous().t() for t in (x, ids, weights))), y)
    for wrong in ((x.double(), ids, weights), (x, ids, weights.double())):
        with pytest.raises(AssertionError, match="first time"):
            layer(*wrong)
    for shape in ((2, 3, 2), (2,)):
        with pytest.raises(ModelError, match="takes x"):
            layer(x[:2], torch.zeros(shape, dtype=torch.int64), torch.rand(shape))
    with pytest.raises(ModelError, match="no gradient"):
        layer(x.clone().requires_grad_(), ids, weights)
    with pytest.raises(ModelError, match="takes x"):
        layer(x, ids.int(), weights)


def test_the_gradients_are_those_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    planes, x, bias = planes_of("int4")[0], torch.randn(3, K), torch.randn(ROWS[0])
    known = linear(x, planes, [bias], "int4", ROWS[:1])
    torch.library.opcheck(
        torch.ops.fxquant.linear.default,
        (x.requires_grad_(), planes, [bias], "int4", [ROWS[0]], ABI),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    bias.requires_grad_()
    y = linear(x, planes, [bias], "int4", ROWS[:1])
    assert torch.equal(y, known)
    y.sum().backward()
    weight = torch.ops.fxquant.dequantize(planes, "int4", ROWS[0], K, torch.float32, ABI)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3))


def test_whoever_watches_ops_sees_what_is_known() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops.append(str(op))
            return op(*args, **(kwargs or {}))

    planes, x = planes_of("int4")[0], torch.randn(3, K)
    for _ in range(2):
        y = linear(x, planes, [], "int4", ROWS[:1])
    with Seen() as seen:
        assert torch.equal(linear(x, planes, [], "int4", ROWS[:1]), y)
    assert seen.ops[0] == "fxquant.linear.default"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x, planes, [], "int4", ROWS[:1])
    assert "fxquant::linear" in {event.key for event in profile.key_averages()}
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, planes, [], "int4", ROWS[:1]).dtype is torch.bfloat16


def test_where_it_cannot_be_compiled_products_start_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "library", lambda: None)
    monkeypatch.setattr(known, "_goes_first", known._goes_first.__wrapped__)
    n = 151  # of no other test: their planes may have lain in the same place
    planes, x = list(random_planes(Scheme.parse("int4"), n, K).values()), torch.randn(3, K)
    first = linear(x, planes, [], "int4", (n,))
    calls, original = [], native.linear
    monkeypatch.setattr(native, "linear", lambda *a: calls.append(1) or original(*a))
    assert torch.equal(linear(x, planes, [], "int4", (n,)), first)
    assert calls == [1]


def test_threads_and_more_products_than_are_kept() -> None:
    planes, x, held = planes_of("int4")[0], torch.randn(1, K), torch.randn(4400 + ROWS[0])
    plain = linear(x, planes, [], "int4", ROWS[:1])

    def part(first: int) -> None:
        for i in range(first, 4400, 4):
            bias = held[i : i + ROWS[0]]
            for _ in range(2):
                torch.testing.assert_close(linear(x, planes, [bias], "int4", ROWS[:1]), plain + bias)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(part, range(4)))
