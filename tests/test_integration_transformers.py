"""Quantized while transformers loads it, a model is what `quantize` makes of it; saved and loaded, it is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_models import PARTLY, assert_same, load, logits, source_in
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
)

import fxquant
from fxquant.expert_modules import QExperts
from fxquant.install import record_of
from fxquant.modules import QLinear

KINDS = ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "bloom", "falcon"]
EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "dbrx"]
"""Stacked from single experts, twice; stacked, transposed, with biases; in a child of the module."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return source_in(tmp_path_factory.mktemp("sources"))


def check_all_ways(source: Path, target: Path, recipe: Any, **kwargs: Any) -> Any:
    """Quantized while it is loaded, it is what `quantize` makes of the loaded model; and what is saved and read."""
    want = fxquant.quantize(AutoModelForCausalLM.from_pretrained(source, **kwargs), recipe, progress=False)
    got = load(source, recipe, **kwargs)
    assert_same(want, got)
    assert torch.equal(logits(want), logits(got))
    left, right = record_of(want), record_of(got)
    assert left is not None
    assert right is not None
    assert left.errors == right.errors
    assert [(e.name, e.scheme) for e in left.plan.entries] == [(e.name, e.scheme) for e in right.plan.entries]
    got.save_pretrained(target)
    again = load(target)
    assert_same(got, again)
    assert torch.equal(logits(got), logits(again))
    return got


@pytest.mark.parametrize("kind", KINDS + EXPERTS)
def test_architectures(kind: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    model = check_all_ways(sources(kind), tmp_path / "saved", "int4")
    assert any(isinstance(module, QExperts) for module in model.modules()) == (kind in EXPERTS)
    assert fxquant.report(model).bytes_after < fxquant.report(model).bytes_before / 2
    assert "while transformers loaded" in str(fxquant.history(model))


@pytest.mark.parametrize("recipe", ["nf4-dq", "nvfp4", "int4-g32-asym", "int8+int8"])
def test_schemes(recipe: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    check_all_ways(sources("llama"), tmp_path / "saved", recipe)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_of_which_some_stay(kind: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    rules = [rule for rule in PARTLY if kind == "mixtral" or "gate_proj" not in rule[0]]
    model = check_all_ways(sources(kind), tmp_path / "saved", rules)
    experts = next(module for module in model.modules() if isinstance(module, QExperts))
    assert experts.scheme_of("down_proj", 0) is None
    assert not any(buffer.is_meta for buffer in experts.buffers())


def test_the_dtype_is_that_which_is_asked_for(sources: Callable[[str], Path], tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model = check_all_ways(sources("llama"), tmp_path / "saved", "int4", dtype=dtype)
    assert model.model.layers[0].self_attn.q_proj.dtype == dtype
    again = load(tmp_path / "saved", dtype=torch.float32)
    layer = again.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == again.model.norm.weight.dtype == torch.float32
    assert torch.equal(layer.codes, model.model.layers[0].self_attn.q_proj.codes)


def test_parts_kept_in_float32_are_as_transformers_keeps_them(tmp_path: Path) -> None:
    """T5 has `wo` in float32, whatever the model is in."""
    model: Any = tiny_model("t5", "AutoModelForSeq2SeqLM")
    model.save_pretrained(tmp_path / "t5")
    kind: Any = type(model)
    want = fxquant.quantize(kind.from_pretrained(tmp_path / "t5", dtype=torch.float16), "int8", progress=False)
    got = load(tmp_path / "t5", "int8", kind, dtype=torch.float16)
    assert_same(want, got)
    assert got.encoder.block[0].layer[-1].DenseReluDense.wo.dtype == torch.float32
    got.save_pretrained(tmp_path / "saved")
    assert_same(got, load(tmp_path / "saved", kind=kind))


def test_tied_weights(tmp_path: Path) -> None:
    """Spelled by a rule, an output embedding gets planes of its own, as in `quantize`; else it stays tied."""
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = check_all_ways(tmp_path / "tied", tmp_path / "saved", [("lm_head", "int8"), ("*", "int4-g32")])
    assert isinstance(model.lm_head, QLinear)
    small = check_all_ways(tmp_path / "tied", tmp_path / "small", "small")
    assert small.lm_head.weight is small.model.embed_tokens.weight
