"""Graphs that are not legal are refused, by what each op says of its arguments; legal ones are not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxquant.codecs import quantize
from fxquant.expert_ops import ABI
from fxquant.legality import violations
from fxquant.listing import op_name
from fxquant.scheme import Scheme

X = torch.empty(3, 8, device="meta")
PLANES = [torch.empty(4, 8, dtype=torch.int8, device="meta"), torch.empty(4, 1, device="meta")]
IDS = torch.empty(3, 2, dtype=torch.int64, device="meta")
STACKS = [torch.empty(5, *plane.shape, dtype=plane.dtype, device="meta") for plane in PLANES]
CODES, SCALES = torch.empty(3, 8, dtype=torch.int8, device="meta"), torch.empty(3, 1, device="meta")
LEGAL_CALLS: dict[str, tuple[Any, ...]] = {
    "linear": (X, PLANES, [], "int8", [4], ABI),
    "linear_on_codes": (X, CODES, SCALES, PLANES, [], "int8+int8", [4], ABI),
    "experts": (X, IDS, STACKS, [], "int8", 4, 5, ABI),
    "experts on nothing": (X[:0], IDS[:0], STACKS, [], "int8", 4, 5, ABI),
}
ILLEGAL_CALLS: list[tuple[str, tuple[Any, ...], str]] = [
    ("linear", (X, [], [], "int8", [4], ABI), r"planes that are not int8 of an \[N=4, K=8\] weight"),
    ("linear", (X, PLANES[::-1], [], "int8", [4], ABI), "planes that are not int8"),
    ("linear", (X, PLANES, [], "int9", [4], ABI), "int9"),
    ("linear", (X, PLANES, [], "int8", [4], ABI - 1), f"its ABI number is {ABI - 1}, this version's is {ABI}"),
    ("linear", (X, PLANES, [], "int8", [4]), "fxquant::linear takes 6 positional arguments, it has 5"),
    ("linear", (X, PLANES, [X, X], "int8", [4], ABI), "biases are not those of their weights"),
    ("linear", (X[0, 0], PLANES, [], "int8", [4], ABI), "IndexError"),
    (
        "linear_on_codes",
        (X, CODES[:2], SCALES, PLANES, [], "int8+int8", [4], ABI),
        "scales that are not int8",
    ),
    ("linear_on_codes", (X, CODES, SCALES, PLANES, [], "int8", [4], ABI), "takes its input as it is"),
    ("experts", (X, IDS, PLANES, [], "int8", 4, 5, ABI), "planes that are not int8 of 5 experts"),
    ("experts", (X, IDS[:2], STACKS, [], "int8", 4, 5, ABI), "int64 ids"),
    ("experts", (X, IDS, STACKS, [X], "int8", 4, 5, ABI), "one bias for all experts"),
    ("experts", (X, IDS, STACKS, [], "int8", 4, 5, ABI + 1), "its ABI number"),
]


def graph_of(name: str, args: tuple[Any, ...]) -> fx.GraphModule:
    """A call, with the tensors among its arguments as inputs."""
    graph = fx.Graph()

    def node_of(tensor: Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = tensor
        return node

    nodes = pytree.tree_map_only(Tensor, node_of, args)
    graph.output(graph.call_function(getattr(torch.ops.fxquant, name.split()[0]).default, nodes))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("name", LEGAL_CALLS)
def test_calls_that_fit_are_legal(name: str) -> None:
    assert violations(graph_of(name, LEGAL_CALLS[name])) == []


@pytest.mark.parametrize(("name", "args", "problem"), ILLEGAL_CALLS)
def test_calls_that_do_not_fit_are_illegal(name: str, args: tuple[Any, ...], problem: str) -> None:
    (found,) = violations(graph_of(name, args))
    assert re.search(problem, found), found


class Rows(nn.Module):
    """A product of rows of x, all of them or those that are not 0, whose number depends on data."""

    def __init__(self, some: bool) -> None:
        super().__init__()
        self.some = some

    def forward(self, x: Tensor, planes: list[Tensor]) -> Tensor:
        rows = x[x.sum(-1).nonzero().squeeze(-1)] if self.some else x
        y: Tensor = torch.ops.fxquant.linear(rows, planes, [], "int8", [4], ABI)
        return y


@pytest.mark.parametrize("some", [False, True])
def test_calls_are_checked_where_sizes_are_symbols(some: bool) -> None:
    args = torch.randn(3, 8), list(quantize(torch.randn(4, 8), Scheme.parse("int8")).values())
    shapes = ({0: torch.export.Dim("rows")}, [None, None])
    gm = torch.export.export(Rows(some), args, dynamic_shapes=shapes).graph_module
    (call,) = [n for n in gm.graph.nodes if op_name(n) == "fxquant.linear"]
    assert isinstance(call.meta["val"].shape[0], torch.SymInt)
    assert violations(gm) == []
    call.args = (*call.args[:3], "int4", *call.args[4:])
    assert "planes that are not int4" in violations(gm)[0]


def test_symbols_are_compared_without_guards() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, codes, scales = (
        mode.from_tensor(
            torch.empty(5, t.shape[1], dtype=t.dtype),
            symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC]),
        )
        for t in (X, CODES, SCALES)
    )
    assert len({str(t.shape[0]) for t in (x, codes, scales)}) > 1
    gm = graph_of("linear_on_codes", (x, codes, scales, PLANES, [], "int8+int8", [4], ABI))
    with mode:
        assert violations(gm) == []
    assert mode.shape_env is not None
    assert mode.shape_env.guards == []


def test_planes_of_one_node_are_looked_at() -> None:
    graph = fx.Graph()
    x, planes = graph.placeholder("x"), graph.placeholder("planes")
    x.meta["val"], planes.meta["val"] = X, PLANES
    graph.output(graph.call_function(torch.ops.fxquant.linear.default, (x, planes, [], "int8", [4], ABI)))
    gm = fx.GraphModule(nn.Module(), graph)
    assert violations(gm) == []
    planes.meta["val"] = PLANES[:1]
    assert "planes that are not int8" in violations(gm)[0]


def test_arguments_by_name_are_counted_apart() -> None:
    gm = graph_of("linear", LEGAL_CALLS["linear"])
    (call,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    call.args, call.kwargs = call.args[:5], {"abi": ABI}
    assert "takes 6 positional arguments, it has 5, and 1 by name" in violations(gm)[0]
