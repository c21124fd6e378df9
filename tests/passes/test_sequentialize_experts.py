"""Stacked experts become linears where that is asked for, in the graph and in the model, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sequential_experts import Experts, X
from tiny_models import tiny_model
from torch import Tensor, fx, nn

from fxquant.api import capture, history, plan, quantize
from fxquant.errors import RecipeError, RewriteError
from fxquant.experts import find_experts
from fxquant.passes import DEFAULT, SequentializeExperts
from fxquant.plans import Plan
from fxquant.rewrite import Step, rewrite
from fxquant.scheme import Scheme
from fxquant.sequential_experts import SequentialExperts

NAMES = [f"layers.{i}.experts" for i in range(3)]


class Layer(nn.Module):
    """A router, experts and what comes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.experts = nn.Linear(16, 16), nn.Linear(16, 3), Experts()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return x + self.experts(self.inp(x), ids, weights)


class Model(nn.Module):
    """Three layers with experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Layer(), Layer(), Layer())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def run(model: nn.Module, one: SequentializeExperts, decided: Plan | None = None) -> tuple[fx.GraphModule, Step]:
    gm = capture(model, (X,))
    (step,) = rewrite(gm, decided, (one,)).steps
    return gm, step


def sequential(gm: nn.Module) -> list[str]:
    return [name for name, module in gm.named_modules() if isinstance(module, SequentialExperts)]


@pytest.mark.parametrize(
    ("names", "reached"),
    [
        (("*",), NAMES),
        (("layers.1",), NAMES[1:2]),
        (("layers.{0,2}.experts",), [NAMES[0], NAMES[2]]),
        (("re:.*[12].experts", "layers.2"), NAMES[1:]),
    ],
)
def test_names(names: tuple[str, ...], reached: list[str]) -> None:
    model = Model()
    want = model(X)
    gm, step = run(model, SequentializeExperts(names))
    assert sequential(gm) == reached
    assert not step.missed
    assert [fired.note for fired in step.fired] == [f"{name}: a linear per matrix" for name in reached]
    assert not sequential(model)  # the user's model is not touched by a pass
    torch.testing.assert_close(gm(X), want)
    calls = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and str(n.target).endswith("experts")]
    assert calls == NAMES


def test_weights_in_the_graph_take_no_room() -> None:
    model = Model()
    gm, _ = run(model, SequentializeExperts())
    stacks = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in gm.parameters()} <= stacks


def test_a_module_called_twice_is_replaced_once() -> None:
    model = Model()
    model.layers[2] = model.layers[0]
    gm, step = run(model, SequentializeExperts())
    assert len(step.fired) == 2
    torch.testing.assert_close(gm(X), model(X))


def with_scheme(model: nn.Module, **schemes: str) -> Plan:
    """A plan in which single matrices have a scheme."""
    made = plan(model, [("layers.*.inp", "int8")], example_inputs=(X,))
    entry = made["layers.0.inp"]
    extra = [replace(entry, name=f"layers.{n[1:]}", scheme=Scheme.parse(s), aliases=()) for n, s in schemes.items()]
    return replace(made, entries=(*made.entries, *extra))


def test_methods() -> None:
    model = Model()
    schemes = {"_0.experts.2.up_proj": "int8+int8-static", "_1.experts.0.up_proj": "int4-g8"}
    decided = with_scheme(model, **schemes)
    gm, step = run(model, SequentializeExperts(methods=("*-static", "llm-int8")), decided)
    assert sequential(gm) == NAMES[:1]
    assert [m.reason for m in step.missed] == ["the plan gives it no scheme of *-static, llm-int8"] * 2
    gm, _ = run(model, SequentializeExperts(methods=("int4*", "*-static")), decided)
    assert sequential(gm) == NAMES[:2]
    assert not sequential(run(model, SequentializeExperts(methods=("int8*",)))[0])  # no plan, no schemes


def test_what_stays() -> None:
    model = Model()
    model.layers[0].experts.down_proj = model.layers[1].experts.down_proj
    model.layers[2].experts.down_proj.grad = torch.zeros(3, 16, 24)
    gm, step = run(model, SequentializeExperts())
    assert not sequential(gm)
    reasons = [miss.reason for miss in step.missed]
    assert (
        reasons[:2]
        == ["layers.0.experts.down_proj and layers.1.experts.down_proj are one parameter, which would be several"] * 2
    )
    assert "its down_proj has a gradient" in reasons[2]


def test_experts_that_cannot_be_read() -> None:
    class Unknown(Experts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, scale: Any = 1) -> Tensor:
            return super().forward(hidden_states, top_k_index, top_k_weights) * scale

    model = Model()
    model.layers[1].experts = Unknown()
    gm, step = run(model, SequentializeExperts())
    assert sequential(gm) == [NAMES[0], NAMES[2]]
    (miss,) = step.missed
    assert "register_experts('Unknown', ...)" in miss.reason


def test_names_that_match_nothing() -> None:
    with pytest.raises(
        RewriteError, match=r'"decoder.\*" matches no experts\n  experts in the graph: layers.0.experts'
    ):
        run(Model(), SequentializeExperts(names=("decoder.*",)))
    with pytest.raises(RecipeError, match=r"names are patterns in a tuple, got '\*.experts'"):
        SequentializeExperts(names="*.experts")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="methods are patterns in a tuple"):
        SequentializeExperts(methods="llm-int8")  # type: ignore[arg-type]


def test_it_runs_only_where_it_is_asked_for() -> None:
    assert not any(isinstance(one, SequentializeExperts) for one in DEFAULT)
    model = quantize(Model(), [("*.inp", "int8")], example_inputs=(X,), progress=False)
    assert not sequential(model)


def test_in_a_pipeline() -> None:
    model = Model()
    want = model(X)
    passes = (SequentializeExperts(), *DEFAULT)
    quantize(model, [("*.inp", "int8")], example_inputs=(X,), passes=passes, progress=False)
    assert sequential(model) == NAMES
    assert history(model).steps[0].name == "SequentializeExperts(names=('*',), methods=('*',))"
    torch.testing.assert_close(model(X), want, rtol=0.1, atol=0.05)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_models_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(kind)
    ids = torch.arange(2 * 7).view(2, 7)
    want = model(ids, use_cache=False).logits.detach()
    gm = capture(model, {"input_ids": ids})
    rewrite(gm, None, (SequentializeExperts(),))
    names = [site.name for site in find_experts(model)]
    assert sequential(gm) == names
    for name in names:
        model.set_submodule(name, gm.get_submodule(name).own_weights())
    torch.testing.assert_close(model(ids, use_cache=False).logits, want)
    recaptured = capture(model, {"input_ids": ids})
    assert {f"{name}.0.down_proj" for name in names} <= {str(n.target) for n in recaptured.graph.nodes}
    torch.testing.assert_close(recaptured(input_ids=ids)["logits"], want)
