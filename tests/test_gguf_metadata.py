"""What files say of models: against transformers' configs and their rotary embeddings, and against gguf."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_contents as checkpoints
import gguf_examples as examples
import pytest
import torch

import fxquant
from fxquant.errors import FileError
from fxquant.gguf import GgufSpec, gguf_config, gguf_header, gguf_metadata, open_gguf
from fxquant.gguf.rope import rope_settings, rope_tensors
from fxquant.scheme import Scheme

gguf = pytest.importorskip("gguf")
IDS = torch.arange(3, 80)[None]


def written(path: Path, name: str, **settings: Any) -> tuple[Any, Any]:
    """A model with some settings, and what is said of it."""
    model = examples.build(name, **settings)
    with torch.no_grad():
        _, described = checkpoints.write(path, checkpoints.quantized(model, lambda *_: None))
    return model, described


@pytest.mark.parametrize("name", examples.MODELS)
def test_they_are_those_that_converters_write(name: str, tmp_path: Path) -> None:
    model, described = written(tmp_path / "a.gguf", name)
    examples.write(tmp_path / "b.gguf", name, model)
    wanted = open_gguf(tmp_path / "b.gguf").metadata
    for key, value in wanted.items():
        # gpt2 has as many key-value heads as others
        if key != "gpt2.attention.head_count_kv":
            assert described.metadata[key] == pytest.approx(value), key
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {key: reader.fields[key].contents() for key in described.metadata}
    assert found == pytest.approx(dict(described.metadata))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"long_factor": [1.0 + i / 8 for i in range(8)], "short_factor": [1.0 + i / 64 for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn with attention": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.25}}),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONG},
        },
    ),
    "partial": ("phi3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
    "local": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": PLAIN | {"rope_theta": 20000.0},
            },
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_embeddings(kind: str, tmp_path: Path) -> None:
    name, settings = ROTARY[kind]
    model, described = written(tmp_path / "model.gguf", name, **settings)
    again: Any = fxquant.load(tmp_path / "model.gguf", dtype=torch.float32, progress=False)
    again.config._attn_implementation = "eager"
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(again(IDS).logits, logits)
        # else the settings would make no difference
        plain = examples.build(name)
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(plain(IDS).logits, logits, rtol=1e-4)
    assert not [note for note in described.notes if "rotary" in note or "YaRN" in note]


def test_factors_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = LLAMA3 | {"rope_theta": 100.0, "original_max_position_embeddings": 64, "low_freq_factor": 2.0}
    model, described = written(tmp_path / "model.gguf", "llama", rope_parameters=settings)
    factors = open_gguf(tmp_path / "model.gguf").tensor("rope_freqs.weight")
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 100.0 ** -(torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / factors, wanted, rtol=1e-5)
    assert len(factors.unique()) > 3
    assert any("config.json" in note for note in described.notes)
    with pytest.raises(FileError, match="not those of llama 3"):
        gguf_config(open_gguf(tmp_path / "model.gguf"))
    model.config.save_pretrained(tmp_path)
    assert gguf_config(open_gguf(tmp_path / "model.gguf"))["rope_parameters"] == settings


def test_notes(tmp_path: Path) -> None:
    for name, settings, word in (
        ("mixtral", {"sliding_window": 16}, "window of 16 for llama"),
        ("starcoder2", {"sliding_window": 8}, "window of 8 for starcoder2"),
        ("phi3", {"sliding_window": 8}, "window of 8 for phi3"),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "betas of YaRN"),
    ):
        _, described = written(tmp_path / "model.gguf", name, **settings)
        assert any(word in note for note in described.notes), (name, described.notes)
    for name in ("gemma2", "gemma3", "gpt-oss", "llama"):
        _, described = written(tmp_path / "model.gguf", name)
        assert described.notes == ("there is no tokenizer, and none is in the file",)


LOST: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act is 'gelu', and readers take it for 'silu'": ("llama", {"hidden_act": "gelu"}),
    "activation_function is 'relu'": ("gpt2", {"activation_function": "relu"}),
    "norm_topk_prob is False": ("qwen3moe", {"norm_topk_prob": False}),
    "norm_topk_prob is True": ("qwen2moe", {"norm_topk_prob": True}),
    "sliding_window is 16": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "alibi is True": ("falcon", {"alibi": True}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "query_pre_attn_scalar is 24": ("gemma2", {"query_pre_attn_scalar": 24}),
    "rope_parameters is .*truncate": ("gpt-oss", {"rope_parameters": YARN | {"truncate": True}}),
    "the kind 'dynamic'": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "post_attention_layernorm": ("falcon", {"parallel_attn": False}),
}


@pytest.mark.parametrize("fault", LOST)
def test_settings_that_would_be_lost(fault: str, tmp_path: Path) -> None:
    name, settings = LOST[fault]
    with pytest.raises(FileError, match=f"(?s){fault}"):
        written(tmp_path / "model.gguf", name, **settings)


def test_rotary_settings_that_are_none() -> None:
    long = {"rope_type": "longrope", **LONG, "short_factor": [1.0] * 7}
    for fault, settings in (("8, 7 factors for 16", long), ("factor None", {"rope_type": "llama3", "rope_theta": 1e4})):
        with pytest.raises(FileError, match=fault):
            rope_tensors(SimpleNamespace(rope_parameters=settings), 16)
    with pytest.raises(FileError, match="factor 'x'"):
        rope_settings(SimpleNamespace(rope_parameters={"rope_type": "linear", "factor": "x"}), 16)
    assert rope_settings(SimpleNamespace(), 16) == rope_tensors(SimpleNamespace(rope_parameters=None), 16) == {}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma", {"hidden_act": "gelu"}),
        ("gpt2", {"activation_function": "gelu"}),
        ("llama", {"rope_parameters": PLAIN | {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 64}}),
        ("falcon", {"num_kv_heads": 4, "multi_query": True}),
        ("granite", {"attention_multiplier": 1 / 3, "rms_norm_eps": 1.00000001e-5}),
    ],
)
def test_settings_that_are_the_same(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "model.gguf", name, **settings)


def test_a_mistral_is_a_llama(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mistral", **examples.SIZES, sliding_window=None)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: Scheme.parse("q4_0"))
        _, described = checkpoints.write(tmp_path / "model.gguf", checkpoint)
    again: Any = fxquant.load(tmp_path / "model.gguf", dtype=torch.float32, progress=False)
    again.config._attn_implementation = "eager"
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert described.metadata["general.architecture"] == "llama"


def test_a_model_that_is_not_written() -> None:
    from transformers import AutoConfig

    with pytest.raises(FileError, match=r"(?s)'phi'.*did you mean phi3.*there are llama"):
        gguf_metadata(AutoConfig.for_model("phi"), None, {}, "x")


@pytest.mark.parametrize(
    ("types", "number"),
    [
        ({"F32": 8}, "ALL_F32"),
        ({"F32": 64, "BF16": 96}, "MOSTLY_BF16"),
        ({"Q4_K": 256, "F16": 512}, "MOSTLY_Q4_K_M"),
        ({"Q4_K": 512, "Q6_K": 256}, "MOSTLY_Q4_K_M"),
        ({"Q8_0": 64}, "MOSTLY_Q8_0"),
        ({"MXFP4": 64}, "MOSTLY_MXFP4_MOE"),
        ({"Q5_1": 64}, "MOSTLY_Q5_1"),
    ],
)
def test_the_type_of_a_file(types: dict[str, int], number: str) -> None:
    model = examples.build("llama")
    found = checkpoints.quantized(model, lambda *_: None)
    specs = {name: GgufSpec("F32", tuple(value.shape)) for name, value in examples.gguf_tensors(model, "llama").items()}
    extra = {f"blk.0.{kind}": GgufSpec(kind, (1 << 20, size)) for kind, size in types.items()}
    described = gguf_metadata(found.contents.config, None, specs | extra, "x")
    assert described.metadata["general.file_type"] == gguf.LlamaFileType[number]


def test_the_header_says_where_tensors_are_to_stand(tmp_path: Path) -> None:
    with torch.no_grad():
        checkpoint = checkpoints.quantized(examples.build("qwen3moe"), lambda *_: Scheme.parse("q4_0"))
    found, described = checkpoints.write(tmp_path / "whole.gguf", checkpoint)
    header, places = gguf_header(described.metadata, described.kinds, found.specs)
    size = (tmp_path / "whole.gguf").stat().st_size
    with (tmp_path / "parts.gguf").open("wb") as file:
        file.truncate(size)
        for unit in reversed(found.units):
            for name, tensor in unit.make(checkpoint).items():
                file.seek(places[name][0])
                assert file.write(tensor.numpy().tobytes()) == places[name][1]
        file.seek(0)
        file.write(header)
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    end = max(offset + nbytes for offset, nbytes in places.values())
    assert (size % 32, 0 <= size - end < 32) == (0, True)
    assert [offset % 32 for offset, _ in places.values()] == [0] * len(places)


def test_values_that_have_no_type() -> None:
    for metadata, kinds in (({"a": 1}, {}), ({"a": "x"}, {"a": (4, None)}), ({"a": -1}, {"a": (4, None)})):
        with pytest.raises(FileError, match="metadata"):
            gguf_header(metadata, kinds, {})
    header, places = gguf_header({"a": 1.5}, {"a": (6, None)}, {})
    assert (header[:4], len(header) % 32, struct.unpack("<IQQ", header[4:24]), places) == (b"GGUF", 0, (3, 0, 1), {})
