"""Patterns find what they describe, in both dialects of graphs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.listing import op_name
from fxquant.patterns import Match, Module, Op, Pattern, match

GATE = Op("mul", Op("silu", "gate"), "up")


def matches(pattern: Pattern, function: Callable[..., Tensor], *args: Tensor) -> dict[str, list[Match]]:
    """The matches in the graph of aten ops and in the graph of torch functions."""
    graphs = {"aten": make_fx(function, pre_dispatch=True)(*args), "torch": fx.symbolic_trace(function)}
    return {
        name: [m for m in (match(pattern, node, gm) for node in gm.graph.nodes) if m is not None]
        for name, gm in graphs.items()
    }


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: F.silu(a) * b,
        lambda a, b: b * F.silu(a),
        lambda a, b: torch.mul(b, F.silu(a)),
        lambda a, b: F.silu(a, inplace=False).mul(b),
    ],
)
def test_finds_a_gate_in_any_spelling(function: Callable[..., Tensor]) -> None:
    for found in matches(GATE, function, torch.randn(3), torch.randn(3)).values():
        (one,) = found
        names = {one["gate"].name.split("_")[0], one["up"].name.split("_")[0]}
        assert names == {"a", "b"}
        assert len(one.nodes) == 2


@pytest.mark.parametrize(
    ("pattern", "function"),
    [
        (GATE, lambda a, b: F.gelu(a) * b),
        (Op("add", "x", "y"), lambda a, b: torch.add(a, b, alpha=2)),
        (Op("mul", "x", 2), lambda a, b: a * 2.0 + b * 3),
        (Op("mul", "x", "x"), lambda a, b: a * b),
        (Op("gelu", "x", approximate="tanh"), lambda a, b: F.gelu(a) + b),
    ],
)
def test_does_not_find_what_is_not_there(pattern: Pattern, function: Callable[..., Tensor]) -> None:
    assert not any(matches(pattern, function, torch.randn(3), torch.randn(3)).values())


def test_a_name_that_stands_twice_is_one_value() -> None:
    for found in matches(Op("mul", "x", "x"), lambda a, b: a * a + b, torch.randn(3), torch.randn(3)).values():
        assert len(found) == 1


def test_commuted_arguments_are_tried_below_the_root() -> None:
    pattern = Op("add", Op("mul", Op("sigmoid", "x"), "y"), "y")
    for found in matches(pattern, lambda a, b: b + b * torch.sigmoid(a), torch.randn(3), torch.randn(3)).values():
        (one,) = found
        assert one["x"] is not one["y"]


def test_modules_match_by_class() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    gm = fx.symbolic_trace(Two())
    found = [m for n in gm.graph.nodes if (m := match(Module(nn.Linear, Module(nn.LayerNorm, "x")), n, gm))]
    assert [m["x"].name for m in found] == ["x"]


def test_names_are_free_of_dialects() -> None:
    gm = fx.symbolic_trace(lambda x: torch.ops.aten.silu(F.silu(x)) + x.silu_().view(-1))
    names = [op_name(n) for n in gm.graph.nodes if n.op.startswith("call")]
    assert names == ["silu", "silu", "silu_", "view", "add"]
