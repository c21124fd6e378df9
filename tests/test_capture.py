import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from fxquant.errors import CaptureError, ModelError
from fxquant.example_inputs import candidates, example_inputs
from fxquant.graph_capture import capture
from fxquant.linears import find_linears, is_expert_stack
from fxquant.modules import QLinear
from fxquant.scheme import Scheme


def called(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


def tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [value for value in leaves if isinstance(value, Tensor)]


def assert_holds_nothing_but_the_model(gm: fx.GraphModule, model: nn.Module) -> None:
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(parameter) for parameter in gm.parameters()} <= own
    for name in called(gm):
        assert gm.get_submodule(name) is model.get_submodule(name)
    assert {type(module) for name, module in gm.named_modules() if name and not _inside(name, called(gm))} <= {
        nn.Module
    }


def _inside(name: str, targets: list[str]) -> bool:
    return any(name == target or name.startswith(f"{target}.") for target in targets)


EXACT = [
    *((kind, "AutoModelForCausalLM") for kind in ("llama", "gpt2", "falcon", "gemma3_text", "mixtral", "gpt_oss")),
    *((kind, "AutoModelForCausalLM") for kind in ("llama4_text", "dbrx", "mamba", "phimoe")),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("switch_transformers", "AutoModelForSeq2SeqLM"),
    ("whisper", "AutoModelForSpeechSeq2Seq"),
    ("vit", "AutoModelForImageClassification"),
    ("clip", "AutoModel"),
    ("wav2vec2", "AutoModelForCTC"),
    ("bert", "AutoModel"),
]


@pytest.mark.parametrize(("kind", "auto_class"), EXACT)
def test_the_graph_computes_what_the_model_computes(kind: str, auto_class: str) -> None:
    model = tiny_model(kind, auto_class)
    gm = capture(model)
    args, kwargs = gm.meta["example_inputs"]
    with torch.no_grad():
        wanted, got = tensors(model(*args, **kwargs)), tensors(gm(*args, **kwargs))
    assert len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert_holds_nothing_but_the_model(gm, model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "bert"])
def test_every_linear_is_called_by_its_own_name(kind: str) -> None:
    model = tiny_model(kind)
    assert sorted(called(capture(model))) == sorted(site.name for site in find_linears(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_called_whatever_their_implementation(implementation: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    gm = capture(model)
    experts = [name for name, module in model.named_modules() if is_expert_stack(module)]
    assert len(experts) == 2
    assert set(experts) <= set(called(gm))
    assert set(model.get_experts_implementation().values()) == {implementation}


def test_keyword_arguments_of_experts_are_kept() -> None:
    gm = capture(tiny_model("gpt_oss"))
    node = next(node for node in gm.graph.nodes if str(node.target).endswith("experts"))
    assert len(node.args) + len(node.kwargs) == 3


def test_a_model_on_meta() -> None:
    model = tiny_model("llama").to("meta")
    gm = capture(model)
    assert sorted(called(gm)) == sorted(site.name for site in find_linears(model))
    assert {node.meta["val"].device.type for node in gm.graph.nodes if node.op == "call_module"} == {"meta"}


def test_nodes_keep_their_origin() -> None:
    gm = capture(tiny_model("llama"))
    node = next(node for node in gm.graph.nodes if node.target == "model.layers.0.mlp.up_proj")
    assert tuple(node.meta["val"].shape) == (1, 8, 128)
    assert list(node.meta["nn_module_stack"].values())[-1][0] == "model.layers.0.mlp.up_proj"
    assert "modeling_llama.py" in node.meta["stack_trace"]


def test_caches_come_back_as_none() -> None:
    model = tiny_model("llama")
    ids = torch.arange(8)[None]
    output = capture(model, {"input_ids": ids, "use_cache": True})(input_ids=ids, use_cache=True)
    assert output.past_key_values is None
    with torch.no_grad():
        assert torch.equal(output.logits, model(ids).logits)


class Twice(nn.Module):
    """One linear called two times, one weight in two linears, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.alias = self.c

    def forward(self, x: Tensor, *, scale: float = 2.0) -> dict[str, Tensor]:
        y = self.a(self.a(x))
        return {"y": scale * self.b(input=y), "z": self.alias(x) + self.c(y)}


def test_repeated_tied_and_aliased_linears() -> None:
    model, x = Twice(), torch.randn(2, 4)
    gm = capture(model, x)
    assert called(gm) == ["a", "a", "b", "c", "c"]
    got, wanted = gm(x), model(x)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_example_inputs_of_every_kind() -> None:
    model, x = Twice(), torch.randn(2, 4)
    for inputs in (x, (x,), [x], {"x": x}, {"x": x, "scale": 3.0}):
        assert len(called(capture(model, inputs))) == 5


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.plain = torch.arange(3.0)
        self.register_buffer("quiet", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(2, 3)
        y[0] = self.inner(x)[0]
        y.add_(torch.tensor([1.0, 2.0, 3.0]) + self.plain)
        return y * self.quiet


def test_constants_and_writes() -> None:
    model, x = Constants(), torch.randn(2, 3)
    gm = capture(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm(2 * x), model(2 * x))
    assert gm.get_buffer("quiet") is model.quiet


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.one(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.two(x)
        return self.three(x.float())


def test_linears_in_autocast_and_no_grad_regions() -> None:
    model, x = Regions(), torch.randn(2, 4)
    gm = capture(model, x)
    nested = [module for module in gm.modules() if isinstance(module, fx.GraphModule) and module is not gm]
    assert sorted(called(gm) + [name for inner in nested for name in called(inner)]) == ["one", "three", "two"]
    assert torch.equal(gm(x), model(x))
    assert all(inner.get_submodule("two") is model.two for inner in nested)


class Block(nn.Module):
    """A layer of a drawn network: `how` says what becomes of the linear's result."""

    def __init__(self, how: str, width: int, bias: bool, conv1d: bool) -> None:
        super().__init__()
        self.how = how
        self.linear = Conv1D(width, width) if conv1d else nn.Linear(width, width, bias=bias)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "twice":
            return functional.gelu(self.linear(self.linear(x)))
        if self.how == "residual":
            return x + self.linear(self.norm(x))
        return self.linear(x).view(x.shape).flip(0)


@settings(deadline=None, max_examples=15)
@given(
    hows=st.lists(st.sampled_from(["twice", "residual", "moved"]), min_size=1, max_size=4),
    width=st.integers(1, 17),
    rows=st.integers(1, 5),
    bias=st.booleans(),
    conv1d=st.booleans(),
    shared=st.booleans(),
)
def test_drawn_networks(hows: list[str], width: int, rows: int, bias: bool, conv1d: bool, shared: bool) -> None:
    blocks = [Block(how, width, bias, conv1d) for how in hows]
    model, x = nn.Sequential(*blocks, *(blocks[:1] if shared else [])), torch.randn(rows, 3, width)
    gm = capture(model, x)
    order: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("linear"):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    wanted = model(x)
    assert called(gm) == order
    assert torch.equal(gm(x), wanted)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
    x = torch.randn(2, 5, 8)
    gm = capture(model, x)
    assert called(gm) == ["linear1", "linear2"]
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model.eval()(x))


def test_multihead_attention() -> None:
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    gm = capture(model, (x, x, x))
    assert called(gm) == []
    for a, b in zip(gm(x, x, x), model.eval()(x, x, x), strict=True):
        torch.testing.assert_close(a, b)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.normed(x))


def test_a_linear_with_a_computed_weight_is_called() -> None:
    model, x = Normed(), torch.randn(2, 4)
    gm = capture(model, x)
    assert called(gm) == ["normed", "plain"]
    assert torch.equal(gm(x), model(x))


def test_a_quantized_linear_is_called() -> None:
    model = nn.Sequential(QLinear(128, 4, Scheme.parse("int4")), nn.Linear(4, 2))
    assert called(capture(model, torch.randn(1, 128))) == ["0", "1"]


def test_hooks_run() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_hook(lambda module, args, output: output - 1)
    gm = capture(model, x)
    assert called(gm) == ["0", "1.0"]
    assert torch.equal(gm(x), model(x))


def test_a_captured_graph_can_be_captured() -> None:
    model, x = Twice(), torch.randn(2, 4)
    gm = capture(capture(model, x), x)
    assert called(gm) == ["a", "a", "b", "c", "c"]
    assert torch.equal(gm(x)["y"], model(x)["y"])


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_control_flow_on_data_is_refused_in_a_paragraph() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(DataDependent(), torch.randn(2, 3))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("DataDependent cannot be captured as one graph: what it computes depends on the values")
    assert "test_capture.py" in lines[1]
    assert "if x.sum() > 0 else x" in lines[1]
    assert len(lines) == 2
    assert caught.value.__cause__ is not None


def test_other_failures_are_told_as_they_are() -> None:
    with pytest.raises(CaptureError, match=r"Twice cannot be captured as one graph: .*takes \[..., 4\], got \[2, 5\]"):
        capture(Twice(), torch.randn(2, 5))
    with pytest.raises(CaptureError, match=r"float32 weight, its input is torch\.float64"):
        capture(Twice(), torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(CaptureError, match="missing a required argument: 'x'"):
        capture(Twice(), {})


def test_derived_inputs_that_fail_are_told() -> None:
    model = tiny_model("esm", "AutoModel")
    model.embeddings.padding_idx = None
    with pytest.raises(CaptureError, match=r"  tried with input_ids \[1, 8\]; pass example_inputs="):
        capture(model)


def test_a_failing_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        capture(DataDependent(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match="got a str"):
        capture("llama")  # type: ignore[arg-type]


def test_a_plain_model_needs_example_inputs() -> None:
    with pytest.raises(CaptureError, match="its forward takes x, scale\n  pass example_inputs="):
        capture(Twice())


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    owners = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    return [{k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in vars(o).items()} for o in owners]


def assert_left_alone(model: nn.Module, before: list[dict[str, Any]]) -> None:
    after = attributes(model)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            same = new[key] is value or type(value) is type(new[key])
            assert same, key
            if isinstance(value, dict):
                assert value.keys() == new[key].keys(), key
                assert all(new[key][k] is v for k, v in value.items()), key


@pytest.mark.parametrize(("kind", "auto_class"), [("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(kind: str, auto_class: str, fails: bool) -> None:
    model = tiny_model(kind, auto_class).train()
    next(model.children()).eval()
    flags = [module.training for module in model.modules()]
    before, state, weights = attributes(model), torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    use_cache, python_state = model.config.use_cache, random.getstate()
    if fails:
        with pytest.raises(CaptureError):
            capture(model, {"input_ids": torch.zeros(3)})
    else:
        capture(model)
    assert [module.training for module in model.modules()] == flags
    assert_left_alone(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python_state
    assert model.config.use_cache == use_cache
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


class Caching(nn.Module):
    """Plants a tensor, a list entry and a new attribute on itself, as models with lazy tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.log = nn.Linear(4, 4), None, []

    def forward(self, x: Tensor) -> Tensor:
        self.table, self.extra = x.new_ones(4), x
        self.log.append(x)
        return self.linear(x) + self.table


def test_what_a_forward_plants_is_taken_back() -> None:
    model, x = Caching(), torch.randn(2, 4)
    capture(model, x)
    assert model.table is None
    assert model.log == []
    assert not hasattr(model, "extra")
    assert torch.equal(capture(model, x)(x), model(x))


def test_no_class_stays_patched() -> None:
    from transformers import cache_utils

    attention, layer = functional.scaled_dot_product_attention, cache_utils.DynamicSlidingWindowLayer
    update, forward = layer.update, nn.Linear.forward
    with pytest.raises(CaptureError):
        capture(tiny_model("llama"), {"input_ids": torch.randn(3)})
    assert functional.scaled_dot_product_attention is attention
    assert layer.update is update
    assert nn.Linear.forward is forward


def test_derived_inputs() -> None:
    inputs = example_inputs(tiny_model("t5", "AutoModelForSeq2SeqLM"))
    assert {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)} == {
        "input_ids": (1, 8),
        "decoder_input_ids": (1, 8),
    }
    assert inputs["use_cache"] is False
    vit = tiny_model("vit", "AutoModelForImageClassification").to(torch.bfloat16)
    assert example_inputs(vit)["pixel_values"].shape[1] == 3
    assert example_inputs(vit)["pixel_values"].dtype == torch.bfloat16
    assert example_inputs(tiny_model("bert", "AutoModel").to("meta"))["input_ids"].device.type == "meta"


def test_derived_tokens_are_no_special_ones() -> None:
    model = tiny_model("gemma3", "AutoModelForImageTextToText")
    tokens = set(example_inputs(model)["input_ids"].flatten().tolist())
    config = model.config
    assert len(tokens) == 8
    assert tokens.isdisjoint({config.image_token_index, config.boi_token_index, config.text_config.eos_token_id})


def test_derived_inputs_are_the_same_each_time() -> None:
    model = tiny_model("whisper", "AutoModelForSpeechSeq2Seq")
    state = torch.random.get_rng_state()
    for one, other in zip(candidates(model), candidates(model), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], Tensor))
    assert torch.equal(torch.random.get_rng_state(), state)
