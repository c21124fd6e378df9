"""Models out of GGUF files: config, names, order of rows, values; against the models that were written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf_examples as examples
import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError, FileError
from fxquant.gguf import gguf_blocks, gguf_config, gguf_plain, gguf_tokenizer, gguf_weights, open_gguf
from fxquant.gguf.files import GgufFile
from fxquant.gguf.rope import rope_parameters

gguf = pytest.importorskip("gguf")
DIRECTORIES = os.environ.get("FXQUANT_ZOO_DIRECTORIES")
IDS = torch.arange(3, 60)[None]


def shapes_of(model: torch.nn.Module) -> dict[str, Any]:
    return {name: value.shape for name, value in model.state_dict().items()}


def decoded(file: GgufFile, weight: Any, n: int, k: int) -> Tensor:
    scheme, planes = weight.read({own: file.tensor(p.name, p.index) for own, p in weight.pieces.items()}, n, k)
    return dequantize(planes, scheme, n, k)


def state(file: GgufFile, model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, as the file has them: planes decoded, experts stacked."""
    shapes = shapes_of(model)
    found = {name: value[...] for name, value in gguf_plain(file, shapes).items()}
    conv1d, interleaved = file.architecture == "gpt2", file.architecture == "gpt-oss"
    for weight in gguf_weights(file, shapes):
        if f"{weight.name}.weight" in shapes:
            shape = shapes[f"{weight.name}.weight"]
            value = decoded(file, weight, *(reversed(shape) if conv1d else shape))
            found[f"{weight.name}.weight"] = value.T if conv1d else value
            continue
        owner, e, projection = weight.name.rsplit(".", 2)
        part = ("gate_proj", "up_proj", "down_proj").index(projection)
        name = f"{owner}.{'down_proj' if part == 2 else 'gate_up_proj'}"
        whole = found.setdefault(name, torch.full(shapes[name], torch.nan))[int(e)]
        matrix = whole.T if interleaved else whole
        rows = matrix if part == 2 else matrix[part::2] if interleaved else matrix.chunk(2)[part]
        rows.copy_(decoded(file, weight, *rows.shape))
    return found


def quantized(tensor: Tensor, type_name: str) -> Tensor:
    kind = gguf.GGMLQuantizationType[type_name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.contiguous().numpy(), kind), kind))


def made(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(found, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("name", examples.MODELS)
def test_floats_are_the_model(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    examples.write(tmp_path / "model.gguf", name, model)
    file = open_gguf(tmp_path / "model.gguf")
    again = made(gguf_config(file))
    values = state(file, again)
    for key, value in model.state_dict().items():
        if key in values:
            # gemma's norms have had 1 added, in float32
            assert torch.allclose(values[key], value, rtol=0, atol=1e-7 if name.startswith("gemma") else 0), key
    missing = again.load_state_dict(values, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    again.tie_weights()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", examples.MODELS)
def test_blocks_are_the_model(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    tensors = examples.write(tmp_path / "model.gguf", name, model, "Q8_0")
    file = open_gguf(tmp_path / "model.gguf")
    values = state(file, model)
    architecture, transposed = file.architecture, file.architecture in ("gpt2", "gpt-oss")
    for key, value in model.state_dict().items():
        stored = key.replace("gate_up_proj", "gate_proj") if "experts" in key else key
        source = examples.gguf_name(stored, architecture)
        if key not in values or source not in tensors:
            assert key == "lm_head.weight"
            continue
        if examples.quantizes(source, tensors[source]):
            turn = transposed and value.ndim > 1 and ("experts" in key or ".h." in key)
            value = quantized(value.mT, "Q8_0").mT if turn else quantized(value, "Q8_0")
        assert torch.allclose(values[key], value, rtol=0, atol=1e-7 if name.startswith("gemma") else 0), key


def test_every_matrix_of_linears_and_experts_stays_quantized(tmp_path: Path) -> None:
    model = examples.build("qwen2moe")
    examples.write(tmp_path / "model.gguf", "qwen2moe", model, "Q4_0")
    file = open_gguf(tmp_path / "model.gguf")
    plain = gguf_plain(file, shapes_of(model))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    experts = {
        f"model.layers.{layer}.mlp.experts.{e}.{projection}"
        for layer in range(2)
        for e in range(3)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    # the gate of shared experts is a vector in these files
    gates = {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(2)}
    assert {weight.name for weight in gguf_weights(file, shapes_of(model))} == linears - gates | experts
    assert plain["model.embed_tokens.weight"][...].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2"])
def test_values_are_those_of_transformers_own_loader(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = examples.build(name)
    examples.write(tmp_path / "model.gguf", name, model, "Q4_0")
    file = open_gguf(tmp_path / "model.gguf")
    options = {"config": model.config, "dtype": torch.float32}  # what it makes of the metadata lacks the size of heads
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **options)
    values = state(file, reference)
    for key, value in reference.state_dict().items():
        assert key not in values or torch.equal(values[key], value), key


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen3", "gemma3", "falcon, new", "mixtral"])
def test_rows_go_back(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    examples.write(tmp_path / "model.gguf", name, model, "Q5_1")
    file = open_gguf(tmp_path / "model.gguf")
    weights = gguf_weights(file, shapes_of(model))
    for weight in weights:
        piece = weight.pieces["blocks"]
        n, k = file.headers[piece.name].shape[-2:]
        blocks = file.tensor(piece.name, piece.index)
        scheme, planes = weight.read({"blocks": blocks}, n, k)
        assert torch.equal(gguf_blocks(file, piece.name, planes, scheme), blocks), weight.name
    assert weights


def test_a_config_has_what_transformers_leaves_out(tmp_path: Path) -> None:
    for name in ("qwen3", "qwen2moe", "mixtral", "gemma2", "gemma3"):
        model = examples.build(name)
        examples.write(tmp_path / f"{name}.gguf", name, model)
        config = gguf_config(open_gguf(tmp_path / f"{name}.gguf"))
        wanted = model.config.to_dict()
        for field in (
            "model_type",
            "head_dim",
            "num_experts",
            "num_local_experts",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "num_experts_per_tok",
            "norm_topk_prob",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
            "sliding_window",
            "layer_types",
            "rms_norm_eps",
            "vocab_size",
            "pad_token_id",
        ):
            if wanted.get(field) is not None and (name, field) != ("mixtral", "head_dim"):
                built = made(config).config.to_dict()
                assert built[field] == wanted[field], (name, field)


def tiny(path: Path, architecture: str = "llama", tensors: dict[str, Any] | None = None, **values: Any) -> GgufFile:
    """A file that says of itself what a test wants, with tensors of a model without layers."""
    writer = gguf.GGUFWriter(path, architecture)
    said = {"block_count": 1, "embedding_length": 64, "attention.head_count": 4, "context_length": 512} | values
    for key, value in said.items():
        full = key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    for name, value in ({"token_embd.weight": np.zeros((256, 64), np.float32)} | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path)


def llama3_factors(dim: int, base: float, factor: float, original: int = 8192) -> np.ndarray:
    """conversion/llama.py, `generate_extra_tensors`."""
    found = []
    for freq in 1.0 / base ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / freq
        if wavelength < original / 4.0:
            found.append(1.0)
        elif wavelength > original:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / 3.0
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_rope_of_llama3_comes_of_its_factors(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": llama3_factors(128, 500000.0, 32.0)}
    says = {"rope.freq_base": 500000.0, "rope.dimension_count": 128, "attention.key_length": 128}
    file = tiny(tmp_path / "a.gguf", tensors=factors, **says)
    assert gguf_config(file)["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = {"rope_freqs.weight": llama3_factors(128, 500000.0, 32.0, 4096)}
    with pytest.raises(FileError, match=r"config\.json"):
        gguf_config(tiny(tmp_path / "b.gguf", tensors=other, **says))


def test_rope_is_scaled_as_the_file_says(tmp_path: Path) -> None:
    said = {"rope.freq_base": 1e4, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    linear = rope_parameters(tiny(tmp_path / "a.gguf", "gemma3", None, **said), 64)
    assert linear == {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    said |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 4096}
    said |= {"rope.scaling.yarn_beta_fast": 16.1}
    yarn = rope_parameters(tiny(tmp_path / "b.gguf", "qwen2", None, **said), 64)
    assert yarn == linear | {"rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 16.1}
    vectors = {f"rope_factors_{kind}.weight": np.full(8, 1.1, np.float32) for kind in ("long", "short")}
    said = {"rope.scaling.original_context_length": 4096, "rope.dimension_count": 16, "rope.freq_base": 1e4}
    long = rope_parameters(tiny(tmp_path / "c.gguf", "phi3", vectors, **said), 32)
    assert (long["long_factor"], long["partial_rotary_factor"]) == ([1.1] * 8, 0.5)
    with pytest.raises(FileError, match="'spiral'"):
        rope_parameters(tiny(tmp_path / "d.gguf", **{"rope.scaling.type": "spiral"}), 64)


@pytest.mark.parametrize(
    "said",
    [
        {"block_count": 2**31},
        {"block_count": 0},
        {"embedding_length": 2**31},
        {"attention.head_count": 2**30},
        {"attention.head_count": 0},
        {"attention.key_length": 2**31},
        {"attention.head_count_kv": [1, 2, 3]},
        {"embedding_length": "wide"},
        {"attention.layer_norm_rms_epsilon": float("nan")},
        {"tokenizer.ggml.padding_token_id": 10**6},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        {"expert_count": 2**31},
        {"attention.key_length": 64.0},
        {"attention.layer_norm_rms_epsilon": 1},
        {"context_length": 512.0},
        {"rope.freq_base": "ten"},
        {"rope.freq_base": -1.0},
    ],
)
def test_metadata_that_cannot_be_true(said: dict[str, Any], tmp_path: Path) -> None:
    file = tiny(tmp_path / "a.gguf", **said)
    with pytest.raises(FileError, match=r"a\.gguf"):
        gguf_config(file)


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    file = tiny(tmp_path / "a.gguf", "qwen3mo")
    with pytest.raises(FileError, match="did you mean qwen3moe"):
        gguf_config(file)
    with pytest.raises(FileError, match="qwen3mo"):
        gguf_weights(file, {})


def test_tensors_that_are_missing_or_too_many(tmp_path: Path) -> None:
    model = examples.build("llama")
    examples.write(tmp_path / "a.gguf", "llama", model, "Q8_0")
    file, shapes = open_gguf(tmp_path / "a.gguf"), shapes_of(model)
    with pytest.raises(FileError, match=r"(?s)lacks.*model\.layers\.0\.self_attn\.q_norm\.weight"):
        gguf_weights(file, shapes | {"model.layers.0.self_attn.q_norm.weight": (32,)})
    with pytest.raises(FileError, match=r"(?s)does not have.*blk\.1\.ffn_up\.weight"):
        gguf_plain(file, {name: s for name, s in shapes.items() if name != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(FileError, match=r"model\.norm\.weight"):
        gguf_plain(file, shapes | {"model.norm.weight": (65,)})
    with pytest.raises(CheckpointError, match="N=64, K=64"):
        decoded(file, gguf_weights(file, shapes)[0], 64, 64)


def test_a_config_beside_the_file(tmp_path: Path) -> None:
    model = examples.build("llama")
    examples.write(tmp_path / "a.gguf", "llama", model)
    file = open_gguf(tmp_path / "a.gguf")
    said = model.config.to_dict() | {"model_type": "mistral", "sliding_window": 77, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "gguf"}}))
    config = gguf_config(file)
    assert (config["model_type"], config["sliding_window"], config["vocab_size"]) == ("mistral", 77, 96)
    assert "quantization_config" not in config
    (tmp_path / "config.json").write_text(json.dumps({"text_config": said | {"model_type": "llama"}}))
    assert gguf_config(file)["architectures"] == ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileError, match="'bert'"):
        gguf_config(file)


@pytest.mark.parametrize("scales", [None, (1,), (3,)])
def test_scales_of_nvfp4_belong_to_their_weights(scales: tuple[int, ...] | None, tmp_path: Path) -> None:
    kind, rng = gguf.GGMLQuantizationType.NVFP4, np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 32, 36), dtype=np.uint8)
    blocks[..., :4] %= 127
    tensors: dict[str, Any] = {} if scales is None else {"blk.0.ffn_down_exps.scale": np.arange(2, 2 + scales[0])}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_down_exps.weight", blocks, raw_dtype=kind)
    for name, value in tensors.items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    shapes = {"model.layers.0.mlp.experts.down_proj": (3, 32, 64)}
    for e, weight in enumerate(gguf_weights(file, shapes)):
        scale = {None: 1.0, (1,): 2.0, (3,): 2.0 + e}[scales]
        expected = torch.from_numpy(gguf.quants.dequantize(blocks[e], kind)) * scale
        assert torch.allclose(decoded(file, weight, 32, 64), expected, rtol=1e-6)
    with pytest.raises(FileError, match=r"\[3, 32, 64\]"):
        gguf_weights(file, {"model.layers.0.mlp.experts.down_proj": (4, 32, 64)})


def test_scales_of_other_types_are_not_forgotten(tmp_path: Path) -> None:
    scale = {"token_embd.scale": np.ones(1, np.float32)}
    with pytest.raises(FileError, match="NVFP4"):
        gguf_plain(tiny(tmp_path / "a.gguf", tensors=scale), {"model.embed_tokens.weight": (256, 64)})


@pytest.mark.parametrize(
    ("architecture", "name"), [("gpt2", "ffn_up"), ("gpt-oss", "ffn_down_exps"), ("llama", "attn_q")]
)
def test_matrices_that_are_vectors(architecture: str, name: str, tmp_path: Path) -> None:
    names = {
        "ffn_up": ("transformer.h.0.mlp.c_fc.weight", (64, 96)),
        "ffn_down_exps": ("model.layers.0.mlp.experts.down_proj", (2, 96, 64)),
        "attn_q": ("model.layers.0.self_attn.q_proj.weight", (64, 64)),
    }
    parameter, shape = names[name]
    embedding = "transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"
    file = tiny(tmp_path / "a.gguf", architecture, {f"blk.0.{name}.weight": np.zeros(96, np.float32)})
    with pytest.raises(FileError, match=parameter):
        gguf_plain(file, {embedding: (256, 64), parameter: shape})


def test_norms_that_are_quantized_are_decoded(tmp_path: Path) -> None:
    kind, values = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0).standard_normal((1, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma")
    writer.add_tensor("output_norm.weight", gguf.quants.quantize(values, kind)[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_plain(open_gguf(tmp_path / "a.gguf"), {"model.norm.weight": (64,)})["model.norm.weight"][...]
    assert torch.equal(found, quantized(torch.from_numpy(values), "Q8_0")[0] - 1)


def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path) -> None:
    kind, rng = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0)
    both = gguf.quants.quantize(rng.standard_normal((2, 6, 64), np.float32), kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_gate_up_exps.weight", both, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    weights = gguf_weights(file, {"model.layers.0.mlp.experts.gate_up_proj": (2, 6, 64)})
    assert [weight.name.removeprefix("model.layers.0.mlp.experts.") for weight in weights] == [
        "0.gate_proj",
        "0.up_proj",
        "1.gate_proj",
        "1.up_proj",
    ]
    whole = torch.from_numpy(gguf.quants.dequantize(both, kind))
    assert torch.equal(torch.stack([decoded(file, w, 3, 64) for w in weights]).view(2, 6, 64), whole)


@pytest.mark.parametrize("type_name", ["Q4_0", "F16", "BF16"])
def test_plain_tensors_in_a_dtype(type_name: str, tmp_path: Path) -> None:
    model = examples.build("gemma")
    tensors = examples.write(tmp_path / "a.gguf", "gemma", model, type_name)
    found = gguf_plain(open_gguf(tmp_path / "a.gguf"), shapes_of(model), torch.bfloat16)
    assert {value[...].dtype for value in found.values()} == {torch.bfloat16}
    embedding = quantized(tensors["token_embd.weight"], type_name)
    assert torch.equal(found["model.embed_tokens.weight"][...], embedding.bfloat16())
    norm = model.model.norm.weight.detach()
    assert torch.equal(found["model.norm.weight"][...], (norm + 1 - 1).bfloat16())


def test_the_tokenizer_of_a_file(tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = ["<|end|>", *letters, "he", "ll", "hell", "hello"]
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    tokenizer = gguf_tokenizer(tiny(tmp_path / "a.gguf", "qwen2", **said))
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello<|end|>é").input_ids) == ["hello", "<|end|>", "Ã", "©"]
    assert tokenizer.eos_token == "<|end|>"
    with pytest.raises(FileError, match="no tokenizer"):
        gguf_tokenizer(tiny(tmp_path / "b.gguf"))


@pytest.mark.skipif(DIRECTORIES is None, reason="FXQUANT_ZOO_DIRECTORIES: a folder of checkpoints of other producers")
@pytest.mark.parametrize("name", ["gguf_q4_0", "gguf_q8_0", "gguf_q4_k", "gguf_q6_k"])
def test_files_of_llama_cpp(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(str(DIRECTORIES)) / name
    expected = load_file(folder / "expected.safetensors")
    alone = tmp_path / "alone.gguf"
    alone.symlink_to(next(folder.glob("*.gguf")))
    file = open_gguf(alone)
    model = made(gguf_config(file))
    values = state(file, model)
    for key, value in expected.items():
        assert key not in values or torch.equal(values[key], value), key
    model.load_state_dict(values)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["expected_logits"]).norm() < 2e-4 * expected["expected_logits"].norm()
