"""One quantization for all linears that read one tensor: exact, and only where it is the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.api import capture, quantize
from fxquant.listing import op_name
from fxquant.modules import QLinear
from fxquant.passes import COMPILE, DEFAULT, ShareActivationQuant
from fxquant.rewrite import History, Step, rewrite

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


class Siblings(nn.Module):
    """Four linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.v, self.gate = nn.Linear(64, 32, bias=False), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return torch.cat([self.q(h), self.k(h), self.v(h), self.gate(h)], -1)


def quantized(model: nn.Module, recipe: Any, **options: Any) -> nn.Module:
    return quantize(model, recipe, example_inputs=(X,), progress=False, **options)


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if op_name(n) == f"fxquant.{name}"]


def step_of(history: History) -> Step:
    (step,) = (s for s in history.steps if s.name.startswith("ShareActivationQuant"))
    return step


def compiled_graph(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Tensor, Step]:
    graphs, histories = [], []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        histories.append(rewrite(gm, passes=COMPILE))
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    (gm,), (history,) = graphs, histories
    return gm, y, step_of(history)


def test_captured_graph() -> None:
    model = quantized(Siblings(), [("{q,k}", "int8+int8"), ("v", "int4-g32+int8"), ("gate", "fp8+fp8")])
    gm = capture(model, (X,))
    history = rewrite(gm, passes=DEFAULT)
    (codes,) = calls(gm, "quantize_activation")
    assert codes.args[1:3] == ("int8", None)
    assert [len(n.args[6]) for n in calls(gm, "linear_on_codes")] == [2, 1]  # q and k are one call
    assert [n.args[3] for n in calls(gm, "linear")] == ["fp8+fp8"]
    assert torch.equal(gm(X), model(X))
    (fired,) = step_of(history).fired
    assert fired.note == "2 linears"
    assert not step_of(history).missed


@pytest.mark.parametrize(
    "schemes", [("int8+int8", "int4-g32+int8"), ("fp8+fp8-g32", "int8+fp8-g32"), ("llm-int8", "fp8+int8-outlier6")]
)
def test_compiled_graph(schemes: tuple[str, str]) -> None:
    model = quantized(Siblings(), [("{q,v}", schemes[0]), ("*", schemes[1])])
    x = X * 4
    gm, y, step = compiled_graph(model, x)
    assert len(calls(gm, "quantize_activation")) == 1
    assert [len(n.args[6]) for n in calls(gm, "linear_on_codes")] == [2, 2]
    assert torch.equal(y, model(x))
    assert not step.missed


def test_gradients_and_inductor() -> None:
    model = quantized(Siblings(), [("{q,v}", "int8+int8"), ("*", "int4-g32+int8")])
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    want = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    x.grad = None
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="fxquant", fullgraph=True)(x).sum().backward()
    for name, grad in {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}.items():
        torch.testing.assert_close(grad, want[name], msg=name)


@pytest.mark.parametrize(
    "recipe", ["int4-g32", [("*", "int8+int8")], [("q", "int8"), ("k", "int8+int8"), ("*", "fp8+fp8")]]
)
def test_nothing_to_share(recipe: Any) -> None:
    model = quantized(Siblings(), recipe)
    gm, y, step = compiled_graph(model, X)
    assert not calls(gm, "quantize_activation")
    assert torch.equal(y, model(X))
    assert not step.fired
    assert not step.missed


def test_static_scales_of_their_own_are_not_shared() -> None:
    model = quantized(
        Siblings(), [("{q,k}", "int8+int8-static"), ("{v,gate}", "int4-g32+int8-static")], calibration=[X]
    )
    model.k.input_scale.mul_(2)
    gm, y, step = compiled_graph(model, X)
    assert [len(n.args[4]) for n in calls(gm, "linear")] == [2, 2]  # merged, and each at the scale of its own
    assert torch.equal(y, model(X))
    assert [miss.reason for miss in step.missed] == ["its input scale is its own"] * 2


def test_two_calls_with_the_same_several_scales_do_not_share() -> None:
    model = quantized(
        Siblings(), [("{q,k}", "int8+int8-static"), ("{v,gate}", "int4-g32+int8-static")], calibration=[X]
    )
    model.k.input_scale.mul_(2)
    for name, other in (("v", "q"), ("gate", "k")):
        model.get_submodule(name)._buffers["input_scale"] = model.get_submodule(other)._buffers["input_scale"]
    gm, y, step = compiled_graph(model, X)
    assert not calls(gm, "linear_on_codes")
    assert torch.equal(y, model(X))
    assert len(step.missed) == 2


def test_one_static_scale_is_shared() -> None:
    model = quantized(Siblings(), [("q", "int8+int8-static"), ("k", "int4-g32+int8-static")], calibration=[X])
    q, k = model.q, model.k
    assert isinstance(q, QLinear)
    k._buffers["input_scale"] = q._buffers["input_scale"]
    gm, y, step = compiled_graph(model, X)
    (codes,) = calls(gm, "quantize_activation")
    assert codes.args[1] == "int8-static"
    assert codes.args[2] in calls(gm, "linear_on_codes")[0].args[3]
    assert len(calls(gm, "linear_on_codes")) == 2
    assert torch.equal(y, model(X))
    assert not step.missed


def test_a_write_in_between_keeps_them_apart() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.a(x) + self.b(x)
            x.add_(1)
            return y + self.c(x)

    model = quantized(Writes(), [("a", "int8+int8"), ("b", "int4-g32+int8"), ("c", "fp8+int8")])
    gm, y, step = compiled_graph(model, X)
    assert (len(calls(gm, "linear_on_codes")), len(calls(gm, "linear"))) == (2, 1)
    assert torch.equal(y, model(X))
    assert ["stands between" in miss.reason for miss in step.missed] == [True]


def test_under_autocast_it_stays_exact() -> None:
    model = quantized(Siblings(), [("{q,v}", "int8+int8"), ("*", "int4-g32+int8")])
    with torch.autocast("cpu", torch.bfloat16):
        gm, y, _ = compiled_graph(model, X)
        want = model(X)
    assert y.dtype == torch.bfloat16
    assert len(calls(gm, "linear_on_codes")) == 2
    assert torch.equal(y, want)


def test_it_can_be_left_out() -> None:
    passes = tuple(one for one in DEFAULT if not isinstance(one, ShareActivationQuant))
    model = quantized(Siblings(), [("{q,v}", "int8+int8"), ("*", "int4-g32+int8")])
    gm = capture(model, (X,))
    rewrite(gm, passes=passes)
    assert not calls(gm, "linear_on_codes")
    assert torch.equal(gm(X), model(X))
