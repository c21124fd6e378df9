"""`quantize` as a user calls it: what it does to a model, and that it does nothing when it refuses."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Rule, dequantize, history, plan, quantize
from fxquant.codecs import dequantize as decode
from fxquant.codecs import quantize as encode
from fxquant.errors import SchemeError
from fxquant.modules import QLinear
from fxquant.scheme import Scheme


class Net(nn.Module):
    """Two linears, one with K = 100, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.first, self.second = nn.Linear(64, 100), nn.Linear(100, 64, bias=False)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(self.embed(tokens)))))


INPUTS = {"example_inputs": (torch.tensor([[1, 2, 3]]),), "progress": False}


def fingerprint(model: nn.Module) -> str:
    """Everything there is to a model: tensors by bytes, modules and parameters by identity, attributes and flags."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {id(tensor)} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {id(module)} {module.training} {sorted(module.__dict__)}".encode())
    return digest.hexdigest()


def test_same_object_and_only_its_linears_change() -> None:
    model = Net()
    first, embed = model.first, model.embed
    weight, bias = first.weight, first.bias
    assert quantize(model, "int8", **INPUTS) is model
    assert isinstance(model.first, QLinear)
    assert model.first.bias is bias
    assert model.embed is embed
    assert model.head.weight is embed.weight
    scheme = Scheme.parse("int8")
    assert torch.equal(model.first.weight, decode(encode(weight.detach(), scheme), scheme, 100, 64, torch.float32))


def test_output_is_that_of_the_dequantized_weights() -> None:
    model = Net()
    reference = copy.deepcopy(model)
    quantize(model, [Rule("second", "int4-g20"), Rule("*", "int4-g32")], **INPUTS)
    for name in ("first", "second"):
        reference.get_submodule(name).weight.data = model.get_submodule(name).weight
    torch.testing.assert_close(model(torch.arange(9)), reference(torch.arange(9)))


def test_a_scale_that_a_library_cannot_store_is_found_before_anything_changes() -> None:
    model = Net()
    with torch.no_grad():
        model.second.weight[3, 5] = 1e9
    before = fingerprint(model)
    recipe = Recipe([Rule("*", "int8-g4-fp16")], scale="compressed-tensors")
    with pytest.raises(SchemeError, match=r"^second: compressed-tensors has no finite scale[^$]*not changed"):
        quantize(model, recipe, **INPUTS)
    assert fingerprint(model) == before


def test_without_a_graph_the_same_weights_come_out() -> None:
    class Untraceable(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens if tokens.sum().item() > 3 else tokens + 1)

    torch.manual_seed(0)
    traced = quantize(Net(), "int8", **INPUTS)
    torch.manual_seed(0)
    model = quantize(Untraceable(), "int8", **INPUTS)
    assert plan(Untraceable(), "int8", example_inputs=INPUTS["example_inputs"]).graph != "captured"
    assert "no graph" in str(history(model))
    for (name, a), b in zip(traced.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_meta_model_gets_meta_planes_of_the_planned_size() -> None:
    with torch.device("meta"):
        model = Net()
    planned = plan(model, "int8", example_inputs=(torch.empty(1, 3, dtype=torch.long, device="meta"),))
    quantize(model, "int8", example_inputs=(torch.empty(1, 3, dtype=torch.long, device="meta"),), progress=False)
    assert isinstance(model.first, QLinear)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    for entry in planned.quantized:
        planes = model.get_submodule(entry.name).planes.values()
        assert sum(p.nbytes for p in planes) == entry.bytes_after


def test_planned_bytes_are_the_bytes_of_the_planes() -> None:
    for recipe in ("int4-g20-asym", "nf4", "nf4-dq", "fp8-tensor", "int8"):
        model = Net()
        rules = Recipe([Rule("second", recipe)])
        planned = plan(model, rules, example_inputs=INPUTS["example_inputs"])
        quantize(model, rules, **INPUTS)
        assert planned["second"].bytes_after == sum(p.nbytes for p in model.second.planes.values())


def test_a_module_under_two_names_stays_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    quantize(model, [Rule("b", "int8")], example_inputs=(torch.randn(1, 32),), progress=False)
    assert isinstance(model.a, QLinear)
    assert model.a is model.b


def test_spelled_head_is_quantized_and_untied_a_wildcard_keeps_it() -> None:
    model = Net()
    kept = plan(model, "int8", example_inputs=INPUTS["example_inputs"])["head"]
    assert kept.scheme is None
    assert "embed.weight" in kept.reason
    quantize(model, [Rule("head", "int8"), Rule("*", "int8")], **INPUTS)
    assert isinstance(model.head, QLinear)
    assert isinstance(model.embed.weight, nn.Parameter)


def test_exclude_stands_before_the_recipe() -> None:
    model = quantize(Net(), "int8", exclude=["second"], **INPUTS)
    assert type(model.second) is nn.Linear
    assert isinstance(model.first, QLinear)


def test_presets_say_what_they_do_with_misfits() -> None:
    planned = plan(Net(), "int4", example_inputs=INPUTS["example_inputs"])
    assert str(planned["first"].scheme) == "int4-g64"
    assert str(planned["second"].scheme) == "int8"
    assert "K=100 is not a multiple" in planned["second"].reason


def test_dequantize_gives_back_the_classes_and_the_values() -> None:
    model = quantize(Net(), "int8", **INPUTS)
    expected = model(torch.arange(5))
    assert dequantize(model) is model
    assert type(model.first) is nn.Linear
    assert torch.equal(model(torch.arange(5)), expected)
    assert "_fxquant" not in model.__dict__
    quantize(model, "int8", **INPUTS)


def test_training_flags_hooks_and_deepcopy_survive() -> None:
    model = Net()
    model.second.eval()
    quantize(model, "int8", **INPUTS)
    assert (model.training, model.first.training, model.second.training) == (True, True, False)
    other = copy.deepcopy(model)
    assert torch.equal(other(torch.arange(5)), model(torch.arange(5)))
    assert str(history(other)) == str(history(model))


def test_history_and_report_see_through_compilation() -> None:
    model = quantize(Net(), "int8", **INPUTS)
    assert str(history(torch.compile(model))) == str(history(model))
    assert fxquant.report(torch.compile(model)).to_dict() == fxquant.report(model).to_dict()


def test_history_tells_what_fired() -> None:
    text = str(history(quantize(Net(), "int8", **INPUTS)))
    assert "LinearToQuantized(): fired 2 times" in text
    assert "kept: protected" in text


def broken_weight(value: float) -> Net:
    model = Net()
    with torch.no_grad():
        model.second.weight[3, 5] = value
    return model


def parametrized() -> Net:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.second)
    return model


def sharing() -> Net:
    model = Net()
    model.third = nn.Linear(64, 100)
    model.third.weight = model.first.weight
    return model


def quantized_net() -> Net:
    model = Net()
    quantize(model, "int8", **INPUTS)
    return model


def yaml(text: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "recipe.yaml").write_text(text)
        return str(folder / "recipe.yaml")

    return write


BAD: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "unknown scheme": (Net, "int44", r"int44.*did you mean.*int4"),
    "unknown part": (Net, "int4-g", r"'g' is not understood"),
    "typo in a rule": (Net, [Rule("frist", "int8")], r"frist.*did you mean.*first"),
    "rule that matches nothing": (Net, [Rule("*", "int8"), Rule("layers.*.mlp", "int8")], r"rule 2 matched nothing"),
    "wildcard that reaches protected modules only": (Net, [Rule("hea*", "int8")], r"protected.*spells"),
    "group does not divide K": (Net, [Rule("*", "int4-g64")], r"second.*K=100 is not a multiple of the group 64"),
    "quantized already": (quantized_net, "int8", r"quantized already: 2 modules, first.*dequantize"),
    "no model": (lambda: {"weight": torch.ones(2)}, "int8", r"a model is needed.*got dict"),
    "compiled": (lambda: torch.compile(Net()), "int8", r"compiled.*quantize first"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4))), "int8", r"TorchScript"),
    "no linears": (lambda: nn.Sequential(nn.ReLU()), "int8", r"holds no linear"),
    "a linear alone": (lambda: nn.Linear(4, 4), "int8", r"the model itself"),
    "inf in a weight": (lambda: broken_weight(float("inf")), "int8", r"second"),
    "nan in a weight": (lambda: broken_weight(float("nan")), "int8", r"second"),
    "computed, read-only weight": (parametrized, [Rule("second", "int8"), Rule("*", "int8")], r"second.*computed"),
    "shared parameter": (sharing, [Rule("third", "int8"), Rule("*", "int8")], r"third.*shares its weight with first"),
    "no such file": (Net, "/no/such/recipe.yaml", r"/no/such/recipe.yaml"),
    "broken yaml": (Net, yaml("rules:\n  - {match: '*', scheme: int4\n"), r"recipe.yaml.*line"),
    "typo in yaml": (Net, yaml("rules:\n  - match: '*'\n    shceme: int4\n"), r"recipe.yaml.*line 3.*shceme.*scheme"),
    "scheme typo in yaml": (Net, yaml("rules:\n  - '*': itn4\n"), r"recipe.yaml.*line 2.*itn4.*int4"),
    "nothing": (Net, None, r"None"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_paragraph_and_changes_nothing(case: str, tmp_path: Path) -> None:
    make, recipe, message = BAD[case]
    model = make()
    recipe = recipe(tmp_path) if callable(recipe) else recipe
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(fxquant.FxquantError, match=f"(?s){message}") as caught:
        quantize(model, recipe, example_inputs=(torch.tensor([[1, 2, 3]]),), progress=False)
    text = str(caught.value)
    assert len(text.splitlines()) <= 8
    assert "\n\n" not in text
    assert "Traceback" not in text
    if before is not None:
        assert fingerprint(model) == before


def test_a_failing_pass_changes_nothing() -> None:
    from dataclasses import dataclass

    from fxquant.passes import DEFAULT
    from fxquant.rewrite import Editor, Pass

    @dataclass(frozen=True)
    class Fails(Pass):
        def run(self, edit: Editor) -> None:
            raise ValueError("no idea")

    model = Net()
    before = fingerprint(model)
    with pytest.raises(fxquant.FxquantError, match=r"Fails\(\), after .*MergeSiblings\(\).*: ValueError: no idea"):
        quantize(model, "int8", passes=(*DEFAULT, Fails()), **INPUTS)
    assert fingerprint(model) == before


def test_an_interruption_leaves_a_model_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(entry: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.api.layer_progress", lambda *_, **__: contextlib.nullcontext(interrupt))
    model = Net()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "int8", **INPUTS)
    assert isinstance(model.first, QLinear)
    assert type(model.second) is nn.Linear
    partly = model(torch.arange(5))
    dequantize(model)
    assert torch.equal(model(torch.arange(5)), partly)


def test_unwritable_recipe_path_is_refused() -> None:
    with pytest.raises(fxquant.FxquantError, match=r"/proc/nowhere/r.yaml"):
        Recipe([Rule("*", "int8")]).to_file("/proc/nowhere/r.yaml")


def test_read_only_memory_can_be_quantized(tmp_path: Path) -> None:
    """Weights are read, never written: a read-only memory map, as safetensors gives, is as good as any."""
    data = np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
    data.tofile(tmp_path / "weight.bin")
    mapped = np.memmap(tmp_path / "weight.bin", dtype=np.float32, mode="r", shape=(64, 100))
    model = Net()
    with pytest.warns(UserWarning, match="not writable"):
        model.second.weight = nn.Parameter(torch.from_numpy(mapped), requires_grad=False)
    quantize(model, "int8", **INPUTS)
    scheme = Scheme.parse("int8")
    expected = decode(encode(torch.from_numpy(data), scheme), scheme, 64, 100, torch.float32)
    assert torch.equal(model.second.weight, expected)


def test_importing_fxquant_is_light() -> None:
    code = (
        "import sys, fxquant; heavy = {'transformers', 'torchao', 'bitsandbytes', 'torch._inductor.lowering'};"
        "found = heavy & set(sys.modules); assert not found, found;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    assert os.system(f'{sys.executable} -c "{code}"') == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "bert", "gemma3_text", "mixtral", "qwen3_moe"])
def test_transformers_models_account_for_every_linear_weight(kind: str) -> None:
    auto = "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    model = tiny_model(kind, auto)
    planned = plan(model, "int8")
    assert planned.graph == "captured"
    named = {e.name for e in planned.entries} | {a for e in planned.entries for a in e.aliases}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            assert name in named
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3:
                inside = [e for e in planned.entries if e.name.startswith(f"{name}.") and e.kind == "expert"]
                parts = ("down_proj",) if leaf == "down_proj" else ("gate_proj", "up_proj")
                mine = [e for e in inside if e.name.endswith(parts)]
                assert sum(math.prod(e.shape) for e in mine) == parameter.numel()
