"""The engine: passes run in order, are checked, recorded, and named when they fail."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.api import capture
from fxquant.errors import RewriteError
from fxquant.listing import op_name
from fxquant.ops import ABI
from fxquant.passes import DropNoops
from fxquant.patterns import Match, Op
from fxquant.rewrite import Editor, Miss, Pass, rewrite


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
