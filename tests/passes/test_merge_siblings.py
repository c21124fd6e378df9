"""Siblings become one call: in captured graphs, in Dynamo's, and only where that is safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.api import capture, quantize
from fxquant.listing import op_name
from fxquant.passes import COMPILE, DropNoops, LinearToQuantized, MergeSiblings
from fxquant.rewrite import History, rewrite


class Block(nn.Module):
    """Queries, keys and values with mixed biases, then a gated MLP."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(64, 64, bias=bias),
            nn.Linear(64, 32, bias=False),
            nn.Linear(64, 32, bias=bias),
        )
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).view(*x.shape[:-1], -1, 16).transpose(1, 2) for one in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def quantized(model: nn.Module, recipe: Any = "int4-g32", x: Tensor | None = None) -> nn.Module:
    return quantize(model, recipe, example_inputs=(torch.randn(2, 5, 64) if x is None else x,), progress=False)


def calls(gm: fx.GraphModule) -> list[int]:
    """How many weights each quantized call serves."""
    return [len(n.args[4]) for n in gm.graph.nodes if op_name(n) == "fxquant.linear"]


def compiled_graphs(model: nn.Module, *args: Tensor) -> tuple[list[fx.GraphModule], Tensor, list[History]]:
    graphs, histories = [], []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        histories.append(rewrite(gm, passes=COMPILE))
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    return graphs, torch.compile(model, backend=backend, fullgraph=True)(*args), histories


@pytest.mark.parametrize("bias", [False, True])
def test_captured_graph(bias: bool) -> None:
    x = torch.randn(2, 5, 64)
    model = quantized(Block(bias))
    gm = capture(model, (x,))
    history = rewrite(gm, passes=(DropNoops(), LinearToQuantized(), MergeSiblings()))
    assert calls(gm) == [3, 2, 1]
    assert torch.equal(gm(x), model(x))
    assert [len(f.removed) for f in history.steps[-1].fired] == [3, 2]


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_graph(bias: bool) -> None:
    x = torch.randn(2, 5, 64)
    model = quantized(Block(bias))
    (gm,), y, _ = compiled_graphs(model, x)
    assert calls(gm) == [3, 2, 1]
    assert torch.equal(y, model(x))


def test_gradients_go_through_the_merged_call() -> None:
    model = quantized(Block(True))
    x = torch.randn(2, 5, 64, requires_grad=True)
    model(x).sum().backward()
    want = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    x.grad = None
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="fxquant", fullgraph=True)(x).sum().backward()
    for name, grad in {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}.items():
        torch.testing.assert_close(grad, want[name], msg=name)


def test_schemes_do_not_mix() -> None:
    model = quantized(Block(), [("k", "int8"), ("*", "int4-g32")])
    (gm,), y, _ = compiled_graphs(model, torch.ones(2, 5, 64))
    assert sorted(calls(gm)) == [1, 1, 2, 2]
    assert torch.equal(y, model(torch.ones(2, 5, 64)))


def test_a_write_in_between_keeps_siblings_apart() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            a, b = self.a(x), self.b(x)
            x.add_(1)
            return a + b + self.c(x)

    model, x = quantized(Writes()), torch.randn(2, 5, 64)
    (gm,), y, (history,) = compiled_graphs(model, x)
    assert calls(gm) == [2, 1]
    assert torch.equal(y, model(x))
    (step,) = (s for s in history.steps if s.name.startswith("MergeSiblings"))
    assert ["stands between" in miss.reason for miss in step.missed] == [True]


def test_autocast_borders_keep_siblings_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            with torch.autocast("cpu", torch.bfloat16):
                return a + self.b(x)

    model, x = quantized(Mixed()), torch.randn(2, 5, 64)
    (gm,), y, _ = compiled_graphs(model, x)
    assert calls(gm) == [1, 1]
    assert torch.equal(y, model(x))


def test_views_of_a_piece_become_reshapes() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).view(x.shape[0], -1) + self.b(x).unsqueeze(0).view(x.shape[0], -1)

    model, x = quantized(Views()), torch.randn(2, 5, 64)
    (gm,), y, _ = compiled_graphs(model, x)
    assert calls(gm) == [2]
    assert torch.equal(y, model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="fxquant", fullgraph=True)(x), model(x))


def test_other_inputs_stay_apart() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    (gm,), _, _ = compiled_graphs(quantized(Chain()), torch.randn(2, 5, 64))
    assert calls(gm) == [1, 1]
