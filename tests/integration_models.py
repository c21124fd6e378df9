"""Checkpoints in transformers' own files, and what comes out of them, for the tests of the integration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from fxquant import FxQuantConfig

PARTLY = [("*.experts.0.*", "keep"), ("*.experts.1.gate_proj", "int8"), ("*.experts.*", "int4-g32"), ("*", "nf4")]


def source_in(root: Path) -> Callable[[str], Path]:
    """Where the checkpoint of a tiny model in full precision is, by its kind; each is written once."""

    def source(kind: str) -> Path:
        if not (root / kind).exists():
            tiny_model(kind).save_pretrained(root / kind)
        return root / kind

    return source


def load(path: Path, recipe: Any = None, kind: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    if recipe is not None:
        kwargs["quantization_config"] = FxQuantConfig(recipe)
    model, info = kind.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not info["unexpected_keys"]
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same modules, tensors by name and bit, flags and dtypes."""

    def described(model: nn.Module) -> list[Any]:
        return [(n, type(m), getattr(m, "dtype", None), m.training) for n, m in model.named_modules()]

    assert described(a) == described(b)
    one, two = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert tensor.requires_grad == two[name].requires_grad, name
        assert torch.equal(tensor, two[name]), name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([[5, 17, 42, 9, 7, 3]])).logits
    return result


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
