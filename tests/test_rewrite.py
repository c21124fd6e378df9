"""The engine: passes run in order, are checked, recorded, and named when they fail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxquant.api import capture
from fxquant.codecs import quantize
from fxquant.errors import RewriteError
from fxquant.legality import violations
from fxquant.listing import op_name
from fxquant.ops import ABI
from fxquant.passes import DropNoops
from fxquant.patterns import Match, Op
from fxquant.rewrite import Editor, Miss, Pass, rewrite
from fxquant.scheme import Scheme


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x) + F.silu(x)


@dataclass(frozen=True)
class SiluByHand(Pass):
    """silu(x) => x * sigmoid(x); stays out of what `skip` names."""

    skip: str = ""

    def pattern(self) -> Op:
        return Op("silu", "x")

    def check(self, edit: Editor, match: Match) -> Miss | None:
        return Miss("skipped by name") if match["x"].name == self.skip else None

    def rewrite(self, edit: Editor, match: Match) -> fx.Node:
        return edit.call(torch.mul, match["x"], edit.call(torch.sigmoid, match["x"]))


@dataclass(frozen=True)
class Halve(Pass):
    """Puts something of another shape in the place of silu."""

    def pattern(self) -> Op:
        return Op("silu", "x")

    def rewrite(self, edit: Editor, match: Match) -> fx.Node:
        return edit.call(torch.narrow, match["x"], -1, 0, 4)


def captured() -> tuple[fx.GraphModule, Tensor, Tensor]:
    model, x = Gated(), torch.randn(3, 8)
    return capture(model, (x,)), x, model(x)


def test_local_pass_rewrites_every_match() -> None:
    gm, x, expected = captured()
    history = rewrite(gm, passes=(SiluByHand(),))
    names = [op_name(n) for n in gm.graph.nodes]
    assert "silu" not in names
    assert names.count("sigmoid") == 2
    torch.testing.assert_close(gm(x), expected)
    (step,) = history.steps
    assert [len(f.added) for f in step.fired] == [2, 2]
    assert step.name == "SiluByHand(skip='')"
    assert sum(r.target == "silu" for r in history.before) == 2
    assert [r for r in history.after if r.target == "silu"] == []


def test_a_miss_is_recorded_with_its_reason() -> None:
    gm, x, expected = captured()
    history = rewrite(gm, passes=(SiluByHand(skip="x"),))
    (step,) = history.steps
    assert (len(step.fired), len(step.missed)) == (1, 1)
    assert step.missed[0].reason == "skipped by name"
    assert "stayed out of 1: skipped by name" in str(history)
    torch.testing.assert_close(gm(x), expected)


def test_new_nodes_know_shape_and_origin() -> None:
    gm, _, _ = captured()
    history = rewrite(gm, passes=(SiluByHand(),))
    added = {name for fired in history.steps[0].fired for name in fired.added}
    for record in history.after:
        if record.name in added:
            assert (record.shape, record.dtype) == (("3", "8"), "f32")


def test_another_shape_is_refused_with_the_pass_named() -> None:
    gm, _, _ = captured()
    with pytest.raises(RewriteError, match=r"pass Halve\(\), after DropNoops\(\): narrow.* its shape is \(3, 4\)"):
        rewrite(gm, passes=(DropNoops(), Halve()))


def test_an_impossible_call_is_refused_when_it_is_made() -> None:
    @dataclass(frozen=True)
    class Broken(Halve):
        def rewrite(self, edit: Editor, match: Match) -> fx.Node:
            return edit.call(torch.narrow, match["x"], -1, 0, 99)

    gm, _, _ = captured()
    with pytest.raises(RewriteError, match="cannot be called with these arguments"):
        rewrite(gm, passes=(Broken(),))


def test_an_illegal_graph_is_refused() -> None:
    @dataclass(frozen=True)
    class Dangling(Pass):
        def run(self, edit: Editor) -> None:
            first = next(n for n in edit.nodes() if n.op == "call_module")
            first.target = "no.such.module"

    gm, _, _ = captured()
    with pytest.raises(RewriteError, match=r"left the graph illegal:\n.*no\.such\.module"):
        rewrite(gm, passes=(Dangling(),))


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


def test_a_pass_that_makes_an_illegal_call_is_refused() -> None:
    @dataclass(frozen=True)
    class WrongScheme(Pass):
        def pattern(self) -> Op:
            return Op("silu", "x")

        def rewrite(self, edit: Editor, match: Match) -> fx.Node:
            node = edit.gm.graph.call_function(torch.ops.fxquant.linear.default, (match["x"], [], [], "int8", [8], ABI))
            return node

    gm, _, _ = captured()
    with pytest.raises(RewriteError, match=r"WrongScheme\(\) left the graph illegal:\n.*planes that are not int8"):
        rewrite(gm, passes=(WrongScheme(),))


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


def test_history_holds_no_tensors() -> None:
    gm, _, _ = captured()
    history = rewrite(gm, passes=(SiluByHand(),))

    def walk(value: object) -> None:
        assert not isinstance(value, (Tensor, nn.Module, fx.Node))
        for inner in value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ():
            walk(inner)

    walk(history)


def test_drop_noops_leaves_what_changes_something() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.to(torch.float32).view(3, 8).reshape(3, 8).expand(3, 8)
            y = F.dropout(y, 0.5, training=False)
            return y.to(torch.bfloat16).view(24).contiguous() + x.to(torch.float32, copy=True).to(torch.bfloat16).view(
                24
            )

    x = torch.randn(3, 8)
    gm = capture(Casts(), (x,))
    rewrite(gm, passes=(DropNoops(),))
    names = [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]
    assert names.count("expand") == names.count("dropout") == names.count("reshape") == 0
    assert names.count("view") == 2
    assert "_assert_tensor_metadata" not in names
    assert torch.equal(gm(x), Casts()(x))
