"""Where the experts of a model are, for every class of transformers that holds some; and classes of one's own."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from expert_classes import arguments, experts_classes, experts_module, read
from torch import Tensor, nn

from fxquant import experts
from fxquant.errors import ModelError
from fxquant.experts import (
    ExpertsAdapter,
    Projection,
    expert_bias,
    expert_weight,
    find_experts,
    find_unread_experts,
    register_experts,
)

pytest.importorskip("transformers")
GATED = ("gate_proj", "up_proj", "down_proj")


def test_classes_are_found() -> None:
    """Those that the facts of other files rest on; and no fewer than there were when this was written."""
    found = experts_classes()
    assert {"MixtralExperts", "GptOssExperts", "DbrxExperts", "JetMoeParallelExperts", "Step3p7Experts"} <= set(found)
    assert len(found) >= 60


@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_weight_of_every_class_is_one_experts(name: str) -> None:
    """Each element of each stacked parameter belongs to one matrix, which is a view of it."""
    model = nn.ModuleDict({"mlp": experts_module(name)})
    (site,) = find_experts(model)
    assert (site.name, site.aliases, site.module) == ("mlp", ("mlp",), model["mlp"])
    assert find_unread_experts(model) == {}
    module, layout = site.module, site.layout
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for _, e, p in site.linears():
            expert_weight(module, layout, p.name, e).add_(1)
            bias = expert_bias(module, layout, p.name, e)
            assert (bias is None) is (p.bias is None)
            if bias is not None:
                assert bias.shape == expert_weight(module, layout, p.name, e).shape[:1]
                bias.add_(1)
    norm = dict(getattr(module, "post_expert_norm", nn.Module()).named_parameters(prefix="post_expert_norm"))
    for key, parameter in module.named_parameters():
        # LongCat's experts that do nothing have rows among the others' gates.
        used = parameter[: layout.experts] if name == "LongcatFlashExperts" else parameter
        assert (used == (0 if key in norm else 1)).all(), key


@pytest.mark.parametrize(
    "name", ["MixtralExperts", "AriaExperts", "Llama4TextExperts", "DbrxExperts", "InklingSharedExperts"]
)
def test_gate_is_gate_and_up_is_up(name: str) -> None:
    """Without a limit on them, experts are linear in up and down, and not in gate."""
    linear = []
    for projection in GATED:
        module = experts_module(name)
        layout, args = read(module), arguments(module)
        before = module(*args)
        with torch.no_grad():
            for e in range(layout.experts):
                expert_weight(module, layout, projection, e).mul_(2)
        linear.append(torch.allclose(module(*args), 2 * before, atol=1e-3))
    assert linear == [False, True, True]


def test_gate_and_up_of_gpt_oss_alternate() -> None:
    """Up is where -1 makes nothing of everything: (up + 1) * gate * sigmoid(gate)."""
    module = experts_module("GptOssExperts")
    layout = read(module)
    with torch.no_grad():
        module.down_proj_bias.zero_()
        for e in range(layout.experts):
            expert_weight(module, layout, "up_proj", e).zero_()
            bias = expert_bias(module, layout, "up_proj", e)
            assert bias is not None
            bias.fill_(-1)
    assert not module(*arguments(module)).any()


def test_names_are_those_of_checkpoints_on_the_hub() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_local_experts": 3,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    (site,) = find_experts(model)
    names = [name for name, _, _ in site.linears()]
    assert names[:4] == [
        f"model.layers.0.mlp.experts.{end}" for end in ("0.gate_proj", "0.up_proj", "0.down_proj", "1.gate_proj")
    ]
    assert len(names) == 9
    assert expert_weight(site.module, site.layout, "up_proj", 2).shape == (8, 16)
    assert [s.name for s in find_experts(site.module)] == [""]
    assert next(find_experts(site.module)[0].linears())[0] == "0.gate_proj"


def test_a_module_with_two_names_comes_once() -> None:
    shared = experts_module("MixtralExperts")
    (site,) = find_experts(nn.ModuleList([nn.ModuleList([shared]), nn.ModuleList([shared])]))
    assert site.aliases == ("0.0", "1.0")


def test_meta_is_enough() -> None:
    module = experts_module("GptOssExperts").to("meta")
    assert expert_weight(module, read(module), "gate_proj", 1).shape == (128, 64)


def test_no_such_projection() -> None:
    module = experts_module("NemotronHExperts")
    with pytest.raises(ModelError, match="no projection 'gate_proj'\n  they have: up_proj, down_proj"):
        expert_weight(module, read(module), "gate_proj", 0)


class MyExperts(nn.Module):
    """The example of the docstring: stacked under other names, without a gate, one expert per token."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        middle = torch.relu(torch.einsum("th,thi->ti", x, self.wi[expert]))
        return torch.einsum("ti,tih->th", middle, self.wo[expert]) * weight.unsqueeze(-1)


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_ADAPTERS", dict(experts._ADAPTERS))
    assert find_experts(MyExperts()) == []
    code = str(experts.__doc__).partition("    def forward(experts")[2]
    space: dict[str, object] = {"torch": torch, "register_experts": register_experts}
    space |= {"ExpertsAdapter": ExpertsAdapter, "Projection": Projection}
    exec("def forward(experts" + code.replace("\n    ", "\n"), space)
    (site,) = find_experts(MyExperts())
    assert [p.name for p in site.layout.projections] == ["up_proj", "down_proj"]
    assert torch.equal(expert_weight(site.module, site.layout, "up_proj", 2), site.module.get_parameter("wi")[2].T)

    class Derived(MyExperts):
        pass

    assert len(find_experts(Derived())) == 1


def undecorated(**attributes: object) -> nn.Module:
    """Step-3.7's class follows the convention without the decorator."""
    module = experts_module("Step3p7Experts")
    vars(module).update(attributes)
    return module


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 8, 4)), nn.Parameter(torch.randn(2, 4, 4))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x


class NoActivation(TwoArguments):
    def __init__(self) -> None:
        super().__init__()
        del self.act_fn

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x


def _with(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    for name, tensor in parameters.items():
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, tensor.is_floating_point()))
    return module


class Llama4TextExperts(TwoArguments):
    """Named like one that the registry knows, and another."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (TwoArguments(), r"forward takes \['x', 'ids'\], not hidden states.*register_experts\('TwoArguments'"),
        (NoActivation(), "neither act_fn nor _apply_gate"),
        (Llama4TextExperts(), r"forward takes \['x', 'ids'\], its adapter \['hidden_states'\]"),
        (_with(undecorated(), down_proj=torch.randn(4, 9, 9)), "shapes do not tell"),
        (_with(undecorated(), gate_up_proj_bias=torch.randn(4, 256)), r"biases are \['gate_up_proj_bias'\]"),
        (undecorated(has_bias=True), "biases are missing"),
        (_with(undecorated(is_transposed=False), gate_up_proj=torch.randn(4, 255, 64)), "do not consist of 2 parts"),
        (_with(undecorated(), gate_up_proj=torch.ones(4, 256, 64, dtype=torch.int8)), "no plain tensor of floats"),
    ],
)
def test_what_cannot_be_read_says_why(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Identity(), module)
    assert find_experts(model) == []
    found = find_unread_experts(model)
    assert list(found) == ["1"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found["1"])


def test_what_does_not_hold_its_experts_says_why() -> None:
    module = experts_module("DbrxExperts")
    module.mlp.w1 = nn.Parameter(torch.randn(513, 64))
    assert "does not hold 4 experts" in find_unread_experts(module)[""]
    del module.mlp.w1
    assert "no parameter mlp.w1" in find_unread_experts(module)[""]
    del module.mlp
    module.other = nn.Parameter(torch.randn(2))
    assert "no child mlp" in find_unread_experts(module)[""]


def test_a_count_of_experts_that_is_none() -> None:
    module = experts_module("DbrxExperts")
    module.num_experts = None
    assert "number of its experts is None" in find_unread_experts(module)[""]


def test_ordinary_modules_hold_no_experts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 3, 3), nn.MultiheadAttention(8, 2))
    assert find_experts(model) == []
    assert find_unread_experts(model) == {}


def test_layers_of_identities_hold_none() -> None:
    module = copy.copy(experts_module("LongcatFlashExperts"))
    empty = _with(module, gate_up_proj=None, down_proj=None)
    assert find_experts(empty) == []
    assert find_unread_experts(empty) == {}


def test_the_registry_names_classes_that_there_are() -> None:
    known = experts_classes()
    for name in experts._ADAPTERS:
        assert hasattr(importlib.import_module(known[name]), name)
