"""Static activation scales: what the inputs reach in full precision, or an error before anything has changed."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.api import dequantize, plan, quantize
from fxquant.errors import ModelError, RewriteError
from fxquant.modules import QLinear
from fxquant.rewrite import Editor, Pass

RECIPE = [("fc1", "int8+int8-static"), ("fc2", "fp8+fp8-static"), ("*", "int4-g32")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2, self.out = (
            nn.Linear(64, 32),
            nn.Dropout(0.5),
            nn.Linear(32, 64),
            nn.Linear(64, 8),
        )
        self.seen: list[bool] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen.append(torch.is_grad_enabled())
        return self.out(self.fc2(input=self.drop(torch.relu(self.fc1(x * scale)))))


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(count)]


def run(model: nn.Module, calibration: Any, recipe: Any = RECIPE, **options: Any) -> nn.Module:
    return quantize(
        model, recipe, example_inputs=(torch.randn(4, 64),), calibration=calibration, progress=False, **options
    )


def state(model: nn.Module) -> Any:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    flags = [m.training for m in model.modules()]
    return {n: t.clone() for n, t in model.state_dict().items()}, hooks, flags, [type(m) for m in model.modules()]


def assert_same(a: Any, b: Any) -> None:
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])
    assert a[1:] == b[1:]


def test_scales_are_what_inputs_reach_in_full_precision() -> None:
    model = Net()
    model.drop.train(False)
    fc1, fc2 = model.fc1, model.fc2
    with torch.no_grad():
        first = max(x.abs().max() for x in batches())
        second = max(torch.relu(fc1(x)).max() for x in batches())
    assert run(model, batches()) is model
    assert model.fc1.input_scale.tolist() == [(first / 127).item()]
    assert model.fc2.input_scale.tolist() == [(second / 448).item()]
    assert [m.training for m in (model, model.drop, model.fc1)] == [True, False, True]
    assert not any(model.seen[-3:])
    assert state(model)[1] == [0] * 5
    assert isinstance(model.fc2, QLinear)
    x = batches()[0]
    torch.testing.assert_close(model.eval()(x), model.out(fc2(torch.relu(fc1(x)))), rtol=0.1, atol=0.1)
    dequantize(model)
    assert type(model.fc1) is type(model.fc2) is nn.Linear


@pytest.mark.parametrize(
    "wrap",
    [
        lambda xs: [(x,) for x in xs],
        lambda xs: [[x, 1.0] for x in xs],
        lambda xs: [{"x": x, "scale": 1.0} for x in xs],
        lambda xs: [UserDict(x=x) for x in xs],
        lambda xs: (x for x in xs),
        lambda xs: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(xs)), batch_size=5),
    ],
)
def test_batches_are_what_the_model_is_called_with(wrap: Callable[[list[Tensor]], Any]) -> None:
    torch.manual_seed(0)
    one = run(Net(), batches())
    torch.manual_seed(0)
    assert torch.equal(run(Net(), wrap(batches())).fc2.input_scale, one.fc2.input_scale)


def test_the_scale_is_that_of_a_dynamic_one_for_the_largest_input() -> None:
    x = torch.randn(1, 64)
    static = run(Net(), [x], [("fc1", "int8+int8-static")]).fc1
    dynamic = QLinear(64, 32, fxquant.Scheme.parse("int8+int8"), bias=static.bias)
    dynamic.load_planes({name: plane for name, plane in static.planes.items() if name != "input_scale"})
    assert torch.equal(static(x), dynamic(x))


def test_none_where_it_is_needed() -> None:
    model = Net()
    before = state(model)
    with pytest.raises(ModelError, match=r"2 of 3 layers .*: fc1, fc2 in int8\+int8-static\n.*calibration="):
        run(model, None)
    assert_same(state(model), before)
    planned = plan(model, RECIPE, example_inputs=(torch.randn(4, 64),))
    assert str(planned["fc1"].scheme) == "int8+int8-static"


def test_one_where_nothing_uses_it() -> None:
    with pytest.raises(ModelError, match="no layer of this plan has static"):
        run(Net(), batches(), [("*", "int8+int8")])


@pytest.mark.parametrize("one", [torch.randn(4, 64), {"x": torch.randn(4, 64)}])
def test_one_batch_is_no_iterable_of_batches(one: Any) -> None:
    with pytest.raises(ModelError, match=r"pass \[inputs\]"):
        run(Net(), one)


def never_called() -> nn.Module:
    model = Net()
    model.spare = nn.Linear(64, 8)
    return model


@pytest.mark.parametrize(
    ("make", "calibration", "message"),
    [
        (Net, [], "2 of 2 layers .* are reached by no calibration batch: fc1, fc2"),
        (Net, [torch.empty(0, 64)], "are reached by no calibration batch"),
        (never_called, batches(), "1 of 3 layers .* are reached by no calibration batch: spare"),
        (Net, [torch.full((1, 64), math.nan)], "get inf or nan from the calibration batches: fc1, fc2"),
        (Net, [torch.zeros(2, 64)], "get only zeros from the calibration batches: fc1"),
        (Net, [torch.randn(2, 63)], "fails on calibration batch 0: RuntimeError"),
        (Net, [*batches(), 5], "calibration batch 3 is a int"),
    ],
)
def test_useless_calibration_changes_nothing(make: Callable[[], nn.Module], calibration: Any, message: str) -> None:
    model = make()
    before = state(model)
    recipe = [("{fc1,spare}", "int8+int8-static"), ("fc2", "fp8+fp8-static"), ("*", "int4-g32")]
    with pytest.raises(ModelError, match=message):
        run(model, calibration, recipe if hasattr(model, "spare") else RECIPE)
    assert_same(state(model), before)


def test_an_interruption_changes_nothing() -> None:
    def interrupted() -> Any:
        yield batches()[0]
        raise KeyboardInterrupt

    model = Net()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted())
    assert_same(state(model), before)


def test_passes_fail_before_the_calibration_runs() -> None:
    class Fails(Pass):
        def run(self, edit: Editor) -> None:
            raise ValueError("no idea")

    def unread() -> Any:
        raise AssertionError("calibration was read")
        yield

    with pytest.raises(RewriteError, match="no idea"):
        run(Net(), unread(), passes=(Fails(),))


def test_hooks_of_others_stay() -> None:
    model, calls = Net(), []
    model.fc1.register_forward_pre_hook(lambda *_: calls.append(1))
    run(model, batches(2))
    assert len(calls) == 2  # they are part of the model, and run with it
    model(batches()[0])
    assert len(calls) == 3


def test_meta_needs_none() -> None:
    with torch.device("meta"):
        model = Net()
    quantize(model, RECIPE, example_inputs=(torch.randn(4, 64, device="meta"),), progress=False)
    assert model.fc1.input_scale.is_meta


def test_it_survives_saving_and_copying() -> None:
    model = run(Net(), batches()).eval()
    torch.manual_seed(1)
    other = run(Net(), batches(1)).eval()
    x = batches()[0]
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = [{"input_ids": torch.randint(0, 99, (2, 7))} for _ in range(4)]
    with torch.no_grad():
        want = model(**inputs[0]).logits
    quantize(model, [("*", "int8+int8-static")], calibration=inputs, progress=False)
    linears = [m for m in model.modules() if isinstance(m, QLinear)]
    assert len(linears) == 14
    scales = torch.stack([m.input_scale for m in linears])
    assert scales.isfinite().all()
    assert len(scales.unique()) > 4
    with torch.no_grad():
        got = model(**inputs[0]).logits
    assert (got - want).norm() < 0.05 * want.norm()
