"""Experts as single linears: the class's own numbers, in eager and in one graph, and bit by bit there and back."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from expert_classes import arguments, experts_classes, experts_module
from torch import Tensor, nn

from fxquant.api import capture, dequantize, plan, quantize
from fxquant.errors import ModelError
from fxquant.expert_layouts import expert_weight
from fxquant.experts import ExpertsAdapter, Projection, find_experts, layout_of
from fxquant.modules import QLinear
from fxquant.sequential_experts import SequentialExperts, sequentialize, stack

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
CLASSES = sorted(experts_classes()) if importlib.util.find_spec("transformers") else []
LAYOUTS = [  # a class of every layout and forward there is
    *("MixtralExperts", "GptOssExperts", "AriaExperts", "NemotronHExperts", "DbrxExperts", "InklingSharedExperts"),
    *("JetMoeParallelExperts", "Llama4TextExperts", "LongcatFlashExperts", "MuseSparkExperts"),
    "OpenAIPrivacyFilterExperts",
]


class Experts(nn.Module):
    """Two projections, gated by the class's own constant and method."""

    limit = 0.5

    def __init__(self, experts: int = 3, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width, generator=random) / 4)
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner, generator=random) / 4)
        self.act_fn = nn.SiLU()

    @staticmethod
    def _clamp(x: Tensor, limit: float) -> Tensor:
        return x.clamp(-limit, limit)

    @property
    def _largest(self) -> float:
        return self.limit

    def _clamped(self, x: Tensor) -> Tensor:
        return self._clamp(x, self.limit)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * self._clamped(up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, slot = torch.where(top_k_index == e)
            y = self._apply_gate(hidden_states[token] @ gate_up.T) @ down.T
            result = result.index_add(0, token, y * top_k_weights[token, slot, None])
        return result


class Model(nn.Module):
    """A router in front of experts, and a linear behind them."""

    def __init__(self, experts: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.head = nn.Linear(16, 3), nn.Linear(16, 8)
        self.experts = experts or Experts()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return self.head(self.experts(x, ids, weights))


IDS = torch.tensor([[0, 1], [1, 0], [0, 0], [-1, 1], [3, 0]])  # twice the same, and none
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))


def run(module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the first argument."""
    x = args[0].clone().requires_grad_()
    result: Tensor = module(x, *args[1:])
    weights = torch.linspace(0.5, 1.5, result.numel()).view_as(result)
    return result.detach(), torch.autograd.grad((result * weights).sum(), x)[0]


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))


def assert_equal(got: nn.Module, want: nn.Module) -> None:
    """The same parameters, buffers and attributes under the same names in the same order."""
    assert type(got) is type(want)
    assert {n for n in vars(got) if n != "_hf_hook"} == {n for n in vars(want) if n != "_hf_hook"}
    for one, other in ((got.named_parameters(), want.named_parameters()), (got.named_buffers(), want.named_buffers())):
        pairs = list(zip(one, other, strict=True))
        for (name, a), (same, b) in pairs:
            assert name == same
            assert (a.shape, a.stride(), a.dtype, a.device, a.requires_grad) == (
                *(b.shape, b.stride(), b.dtype),
                *(b.device, b.requires_grad),
            )
            assert a.is_meta or torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_transformers(name: str) -> None:
    experts = experts_module(name)
    args = arguments(experts)
    made = sequentialize(experts)
    assert_equal(stack(made), experts)
    want, gradient = run(experts, args)
    for got, wanted in zip(run(made, args), (want, gradient), strict=True):
        assert_near(got, wanted)
    torch._dynamo.reset()
    # Dynamo alone: what comes behind it does not depend on the class.
    for got, wanted in zip(
        run(torch.compile(made, backend="eager", fullgraph=True), args), (want, gradient), strict=True
    ):
        assert_near(got, wanted)


@needs_transformers
def test_inductor() -> None:
    experts = experts_module("GptOssExperts")
    args, made = arguments(experts), sequentialize(experts)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(torch.compile(made, fullgraph=True)(*args), made(*args))


@needs_transformers
@pytest.mark.parametrize("name", LAYOUTS)
def test_names_and_values_of_the_linears(name: str) -> None:
    experts = experts_module(name)
    (site,) = find_experts(experts)
    made = sequentialize(site)
    linears = {n: m for n, m in made.named_modules() if isinstance(m, nn.Linear)}
    assert sorted(linears) == sorted(n for n, _, _ in site.linears())
    for n, e, p in site.linears():
        want = expert_weight(experts, site.layout, p.name, e)
        assert torch.equal(linears[n].weight, want)
        assert type(linears[n]) is nn.Linear
        assert (linears[n].out_features, linears[n].in_features) == want.shape
        assert linears[n].weight.is_contiguous()
        assert linears[n].weight.untyped_storage().data_ptr() not in {
            p.untyped_storage().data_ptr() for p in experts.parameters()
        }


@needs_transformers
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_weights(name: str) -> None:
    experts = experts_module(name)
    (site,) = find_experts(experts)
    args, made = arguments(experts), sequentialize(site)
    for module in (experts, made):
        module(*args).square().sum().backward()
    for p in dict.fromkeys(p.parameter for p in site.layout.projections):
        parameter = experts.get_parameter(p)
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.copy_(parameter.grad)  # the same views then read the gradient
    for n, e, p in site.linears():
        want, got = expert_weight(experts, site.layout, p.name, e), made.get_submodule(n).weight.grad
        assert_near(torch.zeros_like(want) if got is None else got, want.detach())


@needs_transformers
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_there_and_back_on_meta_and_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    experts = experts_module(name).requires_grad_(False).eval()
    for module in (experts.to(dtype), copy.deepcopy(experts).to("meta")):
        made = sequentialize(module)
        assert not any(p.requires_grad for p in made.parameters())
        assert not any(m.training for m in made.modules())
        assert_equal(stack(made), module)


def test_meta_experts_give_a_shape() -> None:
    made = sequentialize(Experts().to("meta"))
    assert made(X.to("meta"), IDS.to("meta"), WEIGHTS.to("meta")).shape == X.shape


@pytest.mark.parametrize("rows", [5, 1])
def test_repeated_and_absent_tokens(rows: int) -> None:
    experts, args = Experts(), (X[:rows], IDS[:rows], WEIGHTS[:rows])
    made = sequentialize(experts)
    want = run(experts, args)
    torch._dynamo.reset()
    for module in (made, torch.compile(made, backend="eager", fullgraph=True)):
        for got, wanted in zip(run(module, args), want, strict=True):
            torch.testing.assert_close(got, wanted)


def test_no_tokens() -> None:
    made = sequentialize(Experts())
    torch._dynamo.reset()
    for module in (made, torch.compile(made, backend="eager", fullgraph=True)):
        assert module(X[:0], IDS[:0], WEIGHTS[:0]).shape == (0, 16)
    assert torch.equal(made(X, torch.full_like(IDS, 3), WEIGHTS), torch.zeros_like(X))


def test_rows_of_other_experts_do_not_leak() -> None:
    """What one token holds stays its own matter, in one graph too."""
    made, x = sequentialize(Experts()), X.clone()
    x[1] = float("nan")
    torch._dynamo.reset()
    for module in (made, torch.compile(made, backend="eager", fullgraph=True)):
        result = module(x, IDS, WEIGHTS)
        assert result[1].isnan().all()
        assert result[[0, 2, 3, 4]].isfinite().all()


def test_hooks_see_the_tokens_of_their_expert() -> None:
    made, seen = sequentialize(Experts()), {}
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    made(X, IDS, WEIGHTS)
    assert set(seen) == {f"{e}.{p}" for e in range(2) for p in ("gate_proj", "up_proj", "down_proj")}  # 2 has no token
    for e, tokens in ((0, [0, 1, 2, 2, 4]), (1, [0, 1, 3])):
        assert torch.equal(seen[f"{e}.gate_proj"], X[tokens])
        assert torch.equal(seen[f"{e}.up_proj"], X[tokens])
        assert seen[f"{e}.down_proj"].shape == (len(tokens), 24)


def test_attributes_hooks_and_children_stay() -> None:
    experts, calls = Experts(), []
    experts.extra, experts.act_fn = ["mine"], nn.Tanh()
    experts.compile(backend="eager")
    handle = experts.register_forward_hook(lambda *_: calls.append(1))
    made = sequentialize(experts.eval())
    assert made.extra is experts.extra
    assert made.act_fn is experts.act_fn
    assert made.limit == made._largest == 0.5
    assert made.origin is Experts
    assert not made.training
    made(hidden_states=X, top_k_index=IDS, top_k_weights=WEIGHTS)
    handle.remove()
    made(X, IDS, top_k_weights=WEIGHTS)
    assert len(calls) == 1
    assert made._compiled_call_impl is None
    with pytest.raises(TypeError, match="Experts takes hidden_states, top_k_index, top_k_weights; got 1 positional"):
        made(X)
    with pytest.raises(AttributeError, match="gate_up_proj"):
        _ = made.gate_up_proj
    assert stack(made).extra is experts.extra


def test_copies_and_files() -> None:
    made = sequentialize(Experts())
    want = made(X, IDS, WEIGHTS)
    assert torch.equal(copy.deepcopy(made)(X, IDS, WEIGHTS), want)
    assert torch.equal(pickle.loads(pickle.dumps(made))(X, IDS, WEIGHTS), want)
    other = sequentialize(Experts().to(torch.float64)).float()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(X, IDS, WEIGHTS), want)


def test_autocast() -> None:
    experts, made = Experts(), sequentialize(Experts())
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        want = experts(X, IDS, WEIGHTS)
        for module in (made, torch.compile(made, backend="eager", fullgraph=True)):
            torch.testing.assert_close(module(X, IDS, WEIGHTS), want, rtol=0.05, atol=0.05)


@needs_transformers
def test_some_rows_belong_to_no_expert() -> None:
    """LongCat's identities have rows in one stack and none in the other."""
    experts = experts_module("LongcatFlashExperts")
    made = sequentialize(experts)
    (unread,) = made.unread.values()
    assert unread.shape[0] == 2
    assert not [name for name in made.state_dict() if "unread" in name]
    assert_equal(stack(made.double()).float(), experts)


def test_what_cannot_be_made_sequential() -> None:
    with pytest.raises(ModelError, match="this Linear cannot be made sequential: it holds no stacked experts"):
        sequentialize(nn.Linear(2, 2))
    tied = Experts()
    tied.other = tied.down_proj
    with pytest.raises(ModelError, match="down_proj and other are one parameter"):
        sequentialize(tied)
    patched = Experts()
    patched.forward = lambda *args: args[0]
    with pytest.raises(ModelError, match="its forward is overridden on the instance"):
        sequentialize(patched)
    trained = Experts()
    trained(X, IDS, WEIGHTS).sum().backward()
    with pytest.raises(ModelError, match=r"its gate_up_proj has a gradient.*zero_grad"):
        sequentialize(trained)


def broken(how: str) -> SequentialExperts:
    made = sequentialize(Experts())
    linear, other = made.get_submodule("1.down_proj"), made.get_submodule("2.down_proj")
    changes = {
        "1 is no longer just": lambda: made.get_submodule("1").add_module("lora", nn.Identity()),
        "is a Identity, not an nn.Linear": lambda: setattr(made.get_submodule("1"), "down_proj", nn.Identity()),
        "hooks": lambda: linear.register_forward_hook(lambda *_: None),
        "one and the same": lambda: setattr(linear, "weight", other.weight),
        "torch.bfloat16, cpu, requires_grad=True; torch.float32": lambda: linear.to(torch.bfloat16),
        "requires_grad=False; torch.float32": lambda: linear.requires_grad_(False),
        "it was \\[16, 24\\]": lambda: setattr(linear, "weight", nn.Parameter(torch.zeros(16, 23))),
        "with bias": lambda: setattr(linear, "bias", nn.Parameter(torch.zeros(16))),
        "has a gradient": lambda: linear.weight.sum().backward(),
    }
    changes[how]()
    return made


@pytest.mark.parametrize(
    "how",
    [
        *("is a Identity, not an nn.Linear", "hooks", "one and the same", "it was \\[16, 24\\]", "with bias"),
        *("torch.bfloat16, cpu, requires_grad=True; torch.float32", "requires_grad=False; torch.float32"),
        *("has a gradient", "1 is no longer just"),
    ],
)
def test_what_cannot_be_stacked(how: str) -> None:
    with pytest.raises(ModelError, match=f"these experts cannot be stacked: .*{how}"):
        stack(broken(how))


def test_it_is_no_stack_itself() -> None:
    assert layout_of(sequentialize(Experts())) is None
    with pytest.raises(ModelError, match="this SequentialExperts cannot be made sequential"):
        sequentialize(sequentialize(Experts()))


def test_unknown_projections_are_refused() -> None:
    with pytest.raises(ModelError, match="no projection 'other'"):
        sequentialize(Experts()).project("other", X, IDS)


RULES = [("experts.0", "int8"), ("experts.1.down_proj", None), ("experts.*", "int4-g8"), ("head", "int8+int8-static")]


def test_quantized_expert_by_expert() -> None:
    model = Model(sequentialize(Experts()))
    want = model(X)
    entries = plan(model, RULES, example_inputs=(X,)).entries
    schemes = {entry.name: str(entry.scheme) for entry in entries}
    assert schemes["experts.0.gate_proj"] == "int8-row" or schemes["experts.0.gate_proj"].startswith("int8")
    assert schemes["experts.1.down_proj"] == "None"
    assert schemes["experts.2.up_proj"].startswith("int4-g8")
    quantize(model, RULES, example_inputs=(X,), calibration=[X], progress=False)
    assert type(model.experts) is SequentialExperts
    quantized = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert quantized == {name for name, scheme in schemes.items() if scheme != "None"}
    got = model(X)
    assert 0 < float((got - want).detach().abs().max()) < 0.1
    torch._dynamo.reset()
    assert_near(torch.compile(model, backend="fxquant", fullgraph=True)(X), got)
    with pytest.raises(ModelError, match=r"0.gate_proj is a QLinear, not an nn.Linear"):
        stack(model.experts)
    dequantize(model)
    model.experts = stack(model.experts)
    assert_near(model(X), model(X))
    assert float((model(X) - want).abs().max()) < 0.1


def test_static_scales_of_single_experts() -> None:
    model = Model(sequentialize(Experts()))
    scales = {}
    for name in ("experts.0.up_proj", "experts.1.up_proj"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: scales.update({name: float(args[0].abs().max()) / 127})
        )
    model(X)
    rules = [("experts.*.up_proj", "int8+int8-static")]
    quantize(model, rules, example_inputs=(X,), calibration=[torch.cat([X] * 4)], progress=False)
    for name, scale in scales.items():
        assert float(model.get_submodule(name).input_scale) == pytest.approx(scale)


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant import experts as registry

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wi, self.wo = nn.Parameter(torch.randn(3, 16, 24)), nn.Parameter(torch.randn(3, 24, 16))

        def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
            rows = [torch.relu(r @ self.wi[e]) @ self.wo[e] * w for r, e, w in zip(x, expert, weight, strict=True)]
            return torch.stack(rows)

    def forward(experts: Any, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        ids = expert.unsqueeze(-1)
        y = experts.project("down_proj", torch.relu(experts.project("up_proj", x, ids)), ids)
        return y.squeeze(1) * weight.unsqueeze(-1)

    projections = (Projection("up_proj", "wi", transposed=True), Projection("down_proj", "wo", transposed=True))
    monkeypatch.setitem(registry._ADAPTERS, "Own", ExpertsAdapter(projections, forward))
    own = Own()
    made = sequentialize(own)
    args = (X, IDS[:, 1].clamp(0), WEIGHTS[:, 0])
    assert_near(made(*args), own(*args))
    assert_equal(stack(made), own)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_device_map_hooks() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    experts = Experts()
    want = experts(X, IDS, WEIGHTS)
    add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    made = sequentialize(experts)
    assert type(made._hf_hook) is AlignDevicesHook
    assert_near(made(X, IDS, WEIGHTS), want)
    assert type(stack(made)._hf_hook) is AlignDevicesHook
    experts._hf_hook.offload = True
    with pytest.raises(ModelError, match="load the model without offloading"):
        sequentialize(experts)


def test_capture_needs_no_leaf() -> None:
    model = Model(sequentialize(Experts()))
    gm = capture(model, (X,))
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    assert {f"experts.{e}.{p}" for e in range(3) for p in ("gate_proj", "up_proj", "down_proj")} <= called
    assert_near(gm(X), model(X))
