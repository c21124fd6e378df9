"""Quantized mixtures of experts as users run them: compiled without a break, generating, switched, in rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from expert_classes import experts_module
from tiny_models import tiny_model
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Rule, dequantize, plan, quantize
from fxquant.errors import CaptureError, ModelError, RecipeError, SchemeError
from fxquant.expert_modules import QExperts
from fxquant.experts import find_experts
from fxquant.modules import QLinear
from fxquant.passes import DEFAULT, SequentializeExperts
from fxquant.sequential_experts import SequentialExperts, sequentialize

BACKENDS = {
    **dict.fromkeys(("mixtral", "deepseek_v3", "gpt_oss", "llama4_text"), "inductor"),
    **dict.fromkeys(("qwen3_moe", "granitemoe", "olmoe", "glm4_moe", "ernie4_5_moe", "dbrx"), "aot_eager"),
}
"""What compiles them: Inductor where experts compute different things, else what captures graphs as Inductor does."""
TOKENS = torch.tensor([[5, 17, 42, 99, 7, 3], [8, 1, 77, 31, 20, 11]])


def generate(model: Any) -> Tensor:
    return model.generate(
        TOKENS,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        disable_compile=True,
        pad_token_id=0,
        cache_implementation="static",
    )


RECIPE = Recipe([Rule("*", "int4-g32")], misfit="shrink")
INPUTS = {"example_inputs": {"input_ids": torch.arange(6).view(1, 6)}, "progress": False}


def experts_of(model: nn.Module) -> list[QExperts]:
    return [module for module in model.modules() if isinstance(module, QExperts)]


@pytest.mark.parametrize(("kind", "backend"), BACKENDS.items())
def test_compiled_generate_equals_eager(kind: str, backend: str) -> None:
    model = fxquant.quantize(tiny_model(kind), RECIPE, progress=False)
    assert experts_of(model)
    with torch.no_grad():
        expected = generate(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        got = generate(model)
    assert torch.equal(got, expected)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # prefill and decode


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_implementation_has_no_effect(how: str) -> None:
    model: Any = quantize(tiny_model("qwen3_moe"), "int8", **INPUTS)
    before = logits(model)
    model.set_experts_implementation(how)
    assert torch.equal(logits(model), before)
    assert torch.equal(generate(model), generate(quantize(tiny_model("qwen3_moe"), "int8", **INPUTS)))


def test_rules_reach_single_experts_by_the_names_of_checkpoints() -> None:
    model = tiny_model("mixtral")
    original = copy.deepcopy(model)
    recipe = [
        Rule("model.layers.0.mlp.experts.*", "int8"),
        Rule("*.experts.{0,2}.down_proj", "int4-g32"),
        Rule("*.experts.3.*", None),
        Rule("re:.*experts\\.1\\.gate_proj", "nf4-g32"),
        Rule("*.experts.*", "int5-g32"),
        Rule("*", None),
    ]
    quantize(model, recipe, **INPUTS)
    first, second = experts_of(model)
    assert {str(scheme) for _, _, scheme in first.matrices()} == {"int8"}
    found = {f"{e}.{p.name}": None if s is None else str(s) for e, p, s in second.matrices()}
    assert found["0.down_proj"] == found["2.down_proj"] == "int4-g32"
    assert found["1.gate_proj"] == "nf4-g32"
    assert {found[f"3.{p}_proj"] for p in ("gate", "up", "down")} == {None}
    assert found["1.up_proj"] == found["0.gate_proj"] == found["1.down_proj"] == "int5-g32"
    site = find_experts(original)[1]
    for (name, weight), (e, projection, scheme) in zip(site.weights(), second.matrices(), strict=True):
        held = second.weight_of(projection.name, e)
        assert torch.equal(held, weight) == (scheme is None), name
        assert (held - weight).norm() < 0.15 * weight.norm()
    reference = dequantize(copy.deepcopy(model))
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=1e-4)
    assert type(reference.get_submodule(site.name)) is type(site.module)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ([("*.experts.0.*", "int8"), ("*_proj", "int8")], None, ""),
        (
            [("*.experts.{0..2}.*", "int8")],
            RecipeError,
            r"reach 9 of 12 matrices.*\.3\..* not\n  quantize the rest",
        ),
        ([("*.experts.*.down_proj", "int8")], RecipeError, r"rules reach 4 of 12 matrices"),
        ([("*.experts.7.*", "int8", True), ("*", "int8")], None, ""),
        ([("*.experts.7.*", "int8")], RecipeError, r"rule 1 matched nothing"),
        ([("*.experts.*.gatee_proj", "int8")], RecipeError, r'did you mean "\*\.experts\.\*\.gate_proj"'),
        (
            [("*", "int4-g48")],
            SchemeError,
            r"K=64 is not a multiple of the group 48[^$]*more weights likewise",
        ),
        (
            [("*.experts.*", "int8+int8-static"), ("*", "int8")],
            SchemeError,
            r"stacked experts have no module of their own",
        ),
    ],
)
def test_what_rules_for_experts_may_say(recipe: list[Any], error: type[Exception] | None, message: str) -> None:
    model = tiny_model("mixtral")
    rules = Recipe([Rule(match, scheme, optional=bool(rest)) for match, scheme, *rest in recipe])
    if error is None:
        assert all(e.scheme is not None for e in plan(model, rules).entries if e.kind == "expert")
        return
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        quantize(model, rules, **INPUTS)
    assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("match", "kinds"),
    [
        ("model.layers.1.mlp.experts", {"gate_proj", "up_proj", "down_proj"}),
        ("*.experts.gate_up_proj", {"gate_proj", "up_proj"}),
        ("*.experts.down_proj", {"down_proj"}),
    ],
)
def test_a_stack_can_be_named_as_parameter_or_module(match: str, kinds: set[str]) -> None:
    found = plan(tiny_model("mixtral"), [Rule(match, "int8"), Rule("*", "int4-g32")])
    reached = [e for e in found.entries if str(e.scheme) == "int8"]
    assert {e.kind for e in reached} == {"expert"}
    assert {e.name.rpartition(".")[2] for e in reached} == kinds


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
def test_sequential_and_stacked_experts_hold_the_same_planes_and_agree(kind: str) -> None:
    stacked, sequential = tiny_model(kind), tiny_model(kind)
    quantize(stacked, RECIPE, **INPUTS)
    quantize(sequential, RECIPE, passes=(SequentializeExperts(), *DEFAULT), **INPUTS)
    containers = [(n, m) for n, m in sequential.named_modules() if isinstance(m, SequentialExperts)]
    assert len(containers) == len(experts_of(stacked)) > 0
    for name, container in containers:
        other: Any = stacked.get_submodule(name)
        for e, projection, _ in other.matrices():
            linear = container.get_submodule(f"{e}.{projection.name}")
            assert isinstance(linear, QLinear)
            for plane, tensor in other.planes_of(projection.name, e).items():
                assert torch.equal(linear.planes[plane].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    torch.testing.assert_close(logits(sequential), logits(stacked), atol=2e-5, rtol=1e-4)
    assert {x.name for x in fxquant.report(stacked).layers} == {x.name for x in fxquant.report(sequential).layers}
    dequantize(sequential)
    dequantize(stacked)
    torch.testing.assert_close(logits(sequential), logits(stacked), atol=2e-5, rtol=1e-4)


def test_methods_that_need_modules_get_them_and_others_do_not() -> None:
    recipe = [Rule("model.layers.0.*.experts.*", "int8+int8"), Rule("*", "int8")]
    model = quantize(
        tiny_model("mixtral"), recipe, passes=(SequentializeExperts(methods=("*+int8",)), *DEFAULT), **INPUTS
    )
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), SequentialExperts)
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts"), QExperts)
    reference = dequantize(copy.deepcopy(model))
    assert (logits(model) - logits(reference)).norm() < 0.02 * logits(reference).norm()


def test_static_activations_of_experts_that_were_made_linears() -> None:
    model = tiny_model("mixtral")
    for site in find_experts(model):
        model.set_submodule(site.name, sequentialize(site))
    before = logits(model)
    recipe = [Rule("*.experts.*", "int8+int8-static"), Rule("*", "int8")]
    quantize(model, recipe, calibration=[TOKENS, TOKENS.flip(1)], **INPUTS)
    experts = [m for n, m in model.named_modules() if isinstance(m, QLinear) and ".experts." in n]
    assert len(experts) == 24
    assert len({float(m.planes["input_scale"]) for m in experts}) > 8
    assert (logits(model) - before).norm() < 0.05 * before.norm()


def test_kept_experts_of_a_sequential_container_own_their_weights() -> None:
    recipe = [Rule("*.experts.1.*", None), Rule("*", "int8")]
    model = quantize(tiny_model("mixtral"), recipe, passes=(SequentializeExperts(), *DEFAULT), **INPUTS)
    kept: Any = model.get_submodule("model.layers.0.mlp.experts.1.gate_proj")
    assert type(kept) is nn.Linear
    assert kept.weight.untyped_storage().nbytes() == kept.weight.nbytes


def test_experts_that_cannot_be_replaced_say_why() -> None:
    alone = experts_module("MixtralExperts")
    with pytest.raises(ModelError, match="the model cannot be quantized: it is the model itself"):
        quantize(alone, "int8", progress=False)
    shared: Any = tiny_model("mixtral")
    first, second = (layer.mlp.experts for layer in shared.model.layers)
    second.down_proj = first.down_proj
    found = plan(shared, "int8")
    assert {e.reason for e in found.kept if ".1.mlp.experts." in e.name} == {
        "it shares its weights with model.layers.0.mlp.experts"
    }
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts cannot be quantized: it shares its weights with"):
        quantize(shared, [("*.experts.*.down_proj", "int8"), ("*", "int8")], **INPUTS)


def test_interrupted_in_the_middle_the_model_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    before, count = logits(model), 0
    encode = fxquant.install.quantize

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 24:  # within the second layer's experts
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(fxquant.install, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "int8", **INPUTS)
    kinds = [type(model.get_submodule(f"model.layers.{i}.mlp.experts")) for i in range(2)]
    assert kinds[0] is QExperts
    assert kinds[1] is not QExperts
    assert (logits(model) - before).norm() < 0.02 * before.norm()
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model, "int8", **INPUTS)
    assert not any(isinstance(m, (QLinear, QExperts)) for m in dequantize(model).modules())


def test_without_a_graph_the_same_experts_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise CaptureError("not today")

    want = quantize(tiny_model("mixtral"), "int8", **INPUTS)
    monkeypatch.setattr(fxquant.planning.graph_capture, "capture", refuse)
    got = quantize(tiny_model("mixtral"), "int8", **INPUTS)
    assert torch.equal(logits(got), logits(want))


def test_on_the_meta_device_and_filled_later() -> None:
    real = quantize(tiny_model("mixtral"), "int8", **INPUTS)
    hollow = quantize(tiny_model("mixtral").to("meta"), "int8", progress=False)
    assert all(p.is_meta for p in hollow.parameters())
    wanted, found = real.state_dict(), hollow.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in wanted.items()} == {n: (t.shape, t.dtype) for n, t in found.items()}
    hollow.load_state_dict(wanted, assign=True)
    hollow.model.rotary_emb = real.model.rotary_emb
    assert torch.equal(logits(hollow), logits(real))


def test_copies_casts_and_gradients() -> None:
    model: Any = quantize(tiny_model("mixtral"), "int8", **INPUTS)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    embedded = model.model.embed_tokens(TOKENS).detach().requires_grad_()
    reference: Any = dequantize(copy.deepcopy(model))
    gradients = [
        torch.autograd.grad(m(inputs_embeds=embedded, use_cache=False).logits.square().sum(), embedded)[0]
        for m in (model, reference)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    half = copy.deepcopy(model).bfloat16()
    assert (logits(half).float() - logits(model)).norm() < 0.05 * logits(model).norm()
    assert all(
        torch.equal(a.planes_of("up_proj", 1)["codes"], b.planes_of("up_proj", 1)["codes"])
        for a, b in zip(experts_of(half), experts_of(model), strict=True)
    )


@pytest.mark.parametrize("kind", ["mixtral", "dbrx", "llama4_text"])
def test_quantized_experts_are_one_call_in_a_captured_graph(kind: str) -> None:
    model = quantize(tiny_model(kind), RECIPE, **INPUTS)
    steps = {step.name.partition("(")[0]: step for step in fxquant.history(model).steps}
    count = len(experts_of(model))
    assert count
    graph = fxquant.capture(model, {"input_ids": TOKENS})
    called = [graph.get_submodule(str(n.target)) for n in graph.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(module, QExperts) for module in called) == count
    assert len(steps["ExpertsToQuantized"].fired) == count
    with torch.no_grad():
        found = graph(input_ids=TOKENS)["logits"]
    torch.testing.assert_close(found, model(TOKENS).logits.detach(), atol=1e-5, rtol=1e-4)


def test_experts_that_are_one_product_can_be_captured_and_compiled() -> None:
    model = quantize(tiny_model("jetmoe"), RECIPE, **INPUTS)
    assert len(experts_of(model)) == 8
    graph = fxquant.capture(model, {"input_ids": TOKENS})
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(graph(input_ids=TOKENS)["logits"], expected, atol=1e-5, rtol=1e-4)


def test_shared_experts_are_ordinary_linears_and_routers_stay() -> None:
    found = plan(tiny_model("deepseek_v3"), RECIPE)
    shared = [e for e in found.entries if "shared_expert" in e.name]
    assert shared
    assert all(e.kind == "linear" and e.scheme for e in shared)
    routers = [e for e in found.entries if e.name.endswith(("gate", "gate.weight", "router"))]
    assert routers
    assert not any(e.scheme for e in routers)
