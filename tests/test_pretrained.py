"""Models of transformers by name: what is loaded, what is refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.errors import FileError
from fxquant.pretrained import load_config, load_model, model_class, skeleton

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import tiny_model

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text", "falcon", "bert", "opt", "mixtral", "phi3"])
def test_a_skeleton_has_the_buffers_of_a_model_and_no_weights(kind: str) -> None:
    model = tiny_model(kind)
    empty = skeleton(type(model), copy.deepcopy(model.config))
    for name, buffer in model.named_buffers():
        if name not in model.state_dict():
            assert torch.equal(buffer, empty.get_buffer(name)), name
    matrices = [p for p in empty.parameters() if p.dim() > 1]
    assert matrices
    assert all(p.is_meta for p in matrices)
    nothing = skeleton(type(model), copy.deepcopy(model.config), buffers=False)
    assert all(t.is_meta for t in (*nothing.parameters(), *nothing.buffers()))


def test_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in {
        "folder": "holds no config.json",
        "file": "is a file",
        "foldr": "there is no directory .*did you mean folder",
        "deep/er": "there is no directory",
    }.items():
        with pytest.raises(FileError, match=message):
            load_config(tmp_path / name)


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(FileError, match=r"lacks 1 weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, progress=False)


def test_the_class_comes_from_the_config() -> None:
    config = load_config(DATA / "code-dense")
    assert model_class(config).__name__ == "LlamaForCausalLM"
    for names in (None, [], ["subprocess"], ["LlamaConfig"], [3], "LlamaForCausalLM"):
        config.architectures = names
        with pytest.raises(FileError, match="names the model class"):
            model_class(config)
