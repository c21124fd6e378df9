"""Models written and read back: bit for bit, and nothing but errors for files that are not as they should be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fxquant
from fxquant.errors import FileError, ModelError
from fxquant.expert_modules import QExperts
from fxquant.model_files import WEIGHTS, check_target, is_model_directory, read_model, save
from fxquant.model_index import INDEX, read_index
from fxquant.model_report import report
from fxquant.modules import QLinear
from fxquant.pretrained import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import tiny_model

DATA = Path(__file__).parent / "data"


def write_tiny(kind: str, path: Path, recipe: Any = "int8", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = fxquant.quantize(tiny_model(kind).to(dtype), recipe, progress=False)
    save(model, path)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model"
    write_tiny("llama", path)
    return path


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    """A model of its own for each test, to be damaged."""
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same modules, parameters and buffers by name and bit, also those that no file holds; same sharing."""
    assert [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]
    for left, right in ((a.named_parameters, b.named_parameters), (a.named_buffers, b.named_buffers)):
        one, two = dict(left()), dict(right())
        assert list(one) == list(two)  # named_parameters leaves shared ones out
        for name, tensor in one.items():
            assert tensor.dtype == two[name].dtype, name
            assert tensor.requires_grad == two[name].requires_grad
            assert torch.equal(tensor.flatten().view(torch.uint8), two[name].flatten().view(torch.uint8)), name
    for name, module in a.named_modules():
        if isinstance(module, QLinear):
            other = b.get_submodule(name)
            assert isinstance(other, QLinear)
            for attribute in ("spelling", "dtype", "origin", "transposed", "trainable", "in_features", "out_features"):
                assert getattr(module, attribute) == getattr(other, attribute)
        if isinstance(module, QExperts):
            other = b.get_submodule(name)
            assert isinstance(other, QExperts)
            for attribute in ("stacks", "dtype", "origin", "trainable", "stack_shapes"):
                assert getattr(module, attribute) == getattr(other, attribute)


@pytest.mark.parametrize(
    ("kind", "recipe", "dtype"),
    [
        ("llama", "int4-g32", torch.bfloat16),
        ("llama", [("lm_head", "int8"), ("*", "nf4-dq")], torch.float32),
        ("gpt2", "int8", torch.float32),
        ("opt", "int4-g32-asym", torch.float16),
        ("bloom", "fp8", torch.bfloat16),
        ("gemma3_text", "nf4", torch.bfloat16),
        ("mixtral", "int8", torch.bfloat16),
        (
            "mixtral",
            [("*.experts.{0,2}.*", "nf4-dq"), ("*.experts.3.up_proj", None), ("*", "int4-g32")],
            torch.bfloat16,
        ),
        ("gpt_oss", [("*.experts.*", "mxfp4"), ("*", "int8")], torch.bfloat16),
        ("dbrx", [("*.experts.*.down_proj", "int4-g32-asym"), ("*", "int8")], torch.float32),
        ("longcat_flash", "int8", torch.float32),
    ],
)
def test_a_model_comes_back_bit_for_bit(kind: str, recipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_tiny(kind, tmp_path / "model", recipe, dtype)
    read = read_model(tmp_path / "model")
    assert_same(model, read)
    assert not read.training
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens).logits, read(tokens).logits)
    assert fxquant.dequantize(read) is read


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    model = fxquant.quantize(tiny_model("gpt2"), "int8", progress=False)
    save(model, tmp_path / "model", shard_size=30_000)
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"fxquant-00001-of-{len(shards):05}.safetensors"
    assert is_model_directory(tmp_path / "model")
    assert_same(model, read_model(tmp_path / "model"))
    (tmp_path / "model" / shards[1]).unlink()
    with pytest.raises(FileError, match="cannot read the weights"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["../other.safetensors", "model.safetensors", 3, "fxquant-00001-of-00002.bin"])
def test_an_index_of_shards_names_files_of_its_own_directory(name: object, tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path / "model")
    assert model is not None
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "fxquant.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"names .*not files as fxquant calls them"):
        read_model(tmp_path / "model")


def test_a_model_whose_parts_have_several_dtypes(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    model.model.layers[0].mlp.float()
    fxquant.quantize(model, "int8", progress=False)
    save(model, tmp_path / "model")
    assert_same(model, read_model(tmp_path / "model"))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = write_tiny("gpt2", tmp_path / "model")
    assert model.lm_head.weight is model.transformer.wte.weight
    with safe_open(tmp_path / "model" / WEIGHTS, "pt") as stored:
        names = set(stored.keys())
    assert len(names & {"lm_head.weight", "transformer.wte.weight"}) == 1
    read: Any = read_model(tmp_path / "model")
    assert read.lm_head.weight is read.transformer.wte.weight


def test_a_weight_that_was_tied_and_is_quantized_now_stays_apart(tmp_path: Path) -> None:
    model = write_tiny("gpt2", tmp_path / "model", [("lm_head", "int8"), ("*", "int8")])
    read: Any = read_model(tmp_path / "model")
    assert isinstance(read.lm_head, QLinear)
    assert_same(model, read)


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    model: Any = fxquant.quantize(load_model(DATA / "code-dense", progress=False), "int4", progress=False)
    model.generation_config.top_k = 7
    save(model, tmp_path / "model", load_tokenizer(DATA / "code-dense"), recipe="int4")
    read: Any = read_model(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model")("def f(x):") == load_tokenizer(DATA / "code-dense")("def f(x):")
    assert read.generation_config.top_k == 7
    assert read_index(tmp_path / "model").recipe == "int4"
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert not hasattr(read.config, "quantization_config")
    prompt = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(prompt, max_new_tokens=5), read.generate(prompt, max_new_tokens=5))


def test_the_file_has_the_bytes_that_the_report_promises(tmp_path: Path) -> None:
    model = fxquant.quantize(load_model(DATA / "code-dense", progress=False), "int4", progress=False)
    save(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    planes = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.endswith((".codes", ".scales")))
    assert planes == report(model).bytes_after


def test_transformers_without_fxquant_refuses_the_directory(written: Path) -> None:
    """It must not fill the weights that it does not find with random numbers."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(written)
    config = json.loads((written / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fxquant", "format": 2}


def test_a_view_of_a_large_tensor_is_written_alone(tmp_path: Path) -> None:
    model: Any = fxquant.quantize(tiny_model("llama"), "int8", progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    both = torch.cat([layer.codes, layer.codes])
    layer.codes = both[: len(layer.codes)]
    save(model, tmp_path / "model")
    assert_same(model, read_model(tmp_path / "model"))


class Custom(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("llama"), "nothing in this LlamaForCausalLM is quantized"),
        (lambda: Custom(nn.Linear(4, 4)), "a Custom cannot be built again from files"),
        (lambda: subclassed(), "a Mine cannot be built again from files"),
        (lambda: fxquant.quantize(tiny_model("llama"), "int8", progress=False).to("meta"), "has no values"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        save(make(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def subclassed() -> nn.Module:
    model = fxquant.quantize(tiny_model("llama"), "int8", progress=False)
    model.__class__ = type("Mine", (type(model),), {})
    return model


class FullDisk:
    """A tokenizer on whose files the disk runs full."""

    def save_pretrained(self, path: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    model = fxquant.quantize(tiny_model("llama"), "int8", progress=False)
    with pytest.raises(FileError, match="No space left on device"):
        save(model, tmp_path / "model", FullDisk())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_what_was_there(written: Path) -> None:
    before = {p.name: p.read_bytes() for p in written.iterdir()}
    with pytest.raises(FileError, match="No space left"):
        save(fxquant.quantize(tiny_model("gpt2"), "int8", progress=False), written, FullDisk(), force=True)
    assert {p.name: p.read_bytes() for p in written.iterdir()} == before
    assert list(written.parent.iterdir()) == [written]


def test_force_replaces_a_model_and_nothing_else(written: Path) -> None:
    model = fxquant.quantize(tiny_model("gpt2"), "int8", progress=False)
    with pytest.raises(FileError, match="is not empty"):
        save(model, written)
    save(model, written, force=True)
    assert_same(model, read_model(written))
    assert list(written.parent.iterdir()) == [written]
    (written / INDEX).unlink()
    with pytest.raises(FileError, match="something else than a model that fxquant wrote"):
        check_target(written, force=True)


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(tmp_path / "new")
    for name, message in {
        "file": "is not a directory",
        "link": "is not a directory",
        "missing/model": "there is no directory",
        "file/model": "there is no directory",
    }.items():
        with pytest.raises(FileError, match=message):
            check_target(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "link"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory in which not even root may write")
def test_a_read_only_place_is_refused() -> None:
    with pytest.raises(FileError, match="cannot write /proc/model: /proc: "):
        check_target("/proc/model")


def test_what_a_directory_is(written: Path, tmp_path: Path) -> None:
    assert is_model_directory(written)
    assert not is_model_directory(tmp_path)
    assert not is_model_directory(DATA / "code-dense")
