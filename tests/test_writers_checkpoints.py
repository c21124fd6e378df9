"""Directories in the formats of others: written from models and from other checkpoints, read here and elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_models import logits
from written_checkpoints import (
    Source,
    assert_same_planes,
    assert_same_weights,
    bits,
    parts_of,
    quantized,
    source_in,
    write,
)

from fxquant.checkpoint_files import open_checkpoint
from fxquant.codecs import dequantize
from fxquant.errors import FileError
from fxquant.loading import load
from fxquant.writers import WRITERS

# Another folder of checkpoints with meta.json, one or all formats.
FOLDER = Path(os.environ.get("FXQUANT_ZOO_DIRECTORIES", Path(__file__).parent / "data" / "checkpoints"))
BACK = {"gptq": "gptq", "awq": "awq", "compressed-tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
METHODS = {**BACK, "mxfp4": "gpt-oss"}


def method(path: Path) -> str | None:
    config = json.loads((path / "config.json").read_text())
    return METHODS.get(config.get("quantization_config", {}).get("quant_method"))


def checkpoint_format(path: Path) -> str | None:
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    found: str | None = config.get("checkpoint_format", "gptq" if config["quant_method"] == "gptq" else None)
    return found


DIRECTORIES = sorted(path.parent for path in FOLDER.glob("*/meta.json") if method(path.parent))
REWRITTEN = ("bitsandbytes__nf4", "SCB", "weight_global_scale")
"""JSON, with blanks behind it now; what has several values that give the same scale."""
MIXED = {
    "gptq": {
        "*.q_proj": "int8-row-fp16",
        "*.layers.0.mlp.down_proj": "uint4-g64-fp16",
        "*.k_proj": "int3-g32-fp16-perm",
        "*.self_attn.*": "int4-g32-fp16",
        "*.layers.0.*": "int4-g32-fp16",
    },
    "awq": {"*.layers.0.mlp.down_proj": "uint4-g64-fp16", "*.layers.0.*": "int4-g32-fp16"},
    "compressed-tensors": {
        "*.q_proj": "int8+int8",
        "*.k_proj": "fp8+fp8",
        "*.v_proj": "mxfp4",
        "*.o_proj": "uint4-g32",
        "*.layers.0.mlp.down_proj": "fp8-b64x64",
        "*.layers.0.*": "int4-g32",
    },
    "bitsandbytes": {"*.q_proj": "fp4", "*.k_proj": "nf4-dq", "*.layers.0.*": "nf4"},
}
"""Layer 1 has linears in full precision."""
WHOLE = {
    "gptq": [
        "int4-g32-fp16",
        "uint4-g64-fp16",
        "int3-g32-fp16",
        "int8-row-fp16",
        "uint2-g32-fp16-perm",
        "int5-row-fp16",
    ],
    "awq": ["int4-g32-fp16", "uint4-g64-fp16", "uint4-row-fp16"],
    "compressed-tensors": ["int4-g64", "uint4-g32", "int8+int8", "int8-row", "fp8+fp8", "fp8-tensor", "nvfp4", "mxfp8"],
    "bitsandbytes": ["nf4", "fp4-dq", "llm-int8"],
}


@pytest.mark.parametrize(
    ("format", "recipe"),
    [(format, recipe) for format in BACK for recipe in (*WHOLE[format], "mixed")],
)
def test_a_model_is_read_back(format: str, recipe: str, tmp_path: Path) -> None:
    source = quantized("llama", MIXED[format] if recipe == "mixed" else {"*.layers.*": recipe})
    fits = WRITERS[format].fit(source.contents.matrices)
    assert all(fit.scheme == source.contents.matrices[name].scheme for name, fit in fits.items())
    given, files = write(source, format, tmp_path / "new")
    model = load(tmp_path / "new", progress=False)
    if not any(fit.reason for fit in fits.values()):
        assert_same_weights(given.parts, parts_of(model), given.contents.matrices)
    if recipe == "mixed":
        assert not any(name.startswith("model.layers.1.mlp") for name in parts_of(model))
    activations = {name: scheme.activation for name, (scheme, _) in given.parts.items()}
    assert {name: scheme.activation for name, (scheme, _) in parts_of(model).items()} == activations
    assert files.config["quantization_config"]["quant_method"] == format


@pytest.mark.parametrize("format", BACK)
def test_experts_are_read_back(format: str, tmp_path: Path) -> None:
    recipe = {"bitsandbytes": "nf4", "compressed-tensors": "int4-g32"}.get(format, "int4-g32-fp16")
    given, _ = write(quantized("qwen3_moe", {"*.experts.*": recipe}), format, tmp_path / "new")
    assert any(".experts.1." in name for name in given.parts)
    assert_same_weights(given.parts, parts_of(load(tmp_path / "new", progress=False)), given.contents.matrices)


def test_there_are_directories() -> None:
    assert len({method(path) for path in DIRECTORIES}) >= 4


@pytest.mark.parametrize("path", DIRECTORIES, ids=lambda path: path.name)
def test_what_was_read_is_written_as_it_was(path: Path, tmp_path: Path) -> None:
    source, format = source_in(path), str(method(path))
    fits = WRITERS[format].fit(source.contents.matrices)
    assert all(fit.scheme == source.contents.matrices[name].scheme for name, fit in fits.items())
    write(source, format, tmp_path / "new")
    again = source_in(tmp_path / "new")
    assert_same_planes(source.parts, again.parts)
    assert source.tensors.keys() == again.tensors.keys()
    theirs, ours = open_checkpoint(path), open_checkpoint(tmp_path / "new")
    for name in theirs.headers.keys() & ours.headers.keys():
        one, two = theirs.tensor(name), ours.tensor(name)
        less_one = name.endswith("qzeros") and checkpoint_format(path) == "gptq"
        if not name.endswith(REWRITTEN) and not less_one:
            assert one.dtype == two.dtype, name
            assert torch.equal(bits(one), bits(two)), name
    lost = {name.rpartition(".")[2] for name in theirs.headers.keys() - ours.headers.keys()}
    assert lost <= {"input_global_scale"}  # 4-bit inputs
    assert {name.rpartition(".")[2] for name in ours.headers.keys() - theirs.headers.keys()} <= {"g_idx"}


@pytest.mark.parametrize("path", DIRECTORIES, ids=lambda path: path.name)
@pytest.mark.parametrize("format", BACK)
def test_what_was_read_is_written_in_another_format(path: Path, format: str, tmp_path: Path) -> None:
    given, _ = write(source_in(path), format, tmp_path / "new")
    found = parts_of(load(tmp_path / "new", progress=False))
    assert found.keys() == given.parts.keys()
    for name, matrix in given.contents.matrices.items():
        one, two = (dequantize(parts[name][1], parts[name][0], matrix.n, matrix.k) for parts in (given.parts, found))
        # The last place of scales that are stored as their inverse.
        assert (one - two).abs().max() <= 2.0**-22 * one.abs().max()


def reference(folder: Path, source: Source) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=source.contents.config.dtype)


@pytest.mark.parametrize(
    "recipe",
    ["int4-g32", "int8-row", "int3-g64", "int8+int8", "fp8", "fp8+fp8", "fp8-b64x64", "mxfp4", "nvfp4", "mixed"],
)
def test_transformers_reads_compressed_tensors(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    # What has a format of its own is decompressed to bfloat16, whatever the model's dtype; files with zero points
    # cannot be loaded (transformers 5.23).
    dtype = torch.bfloat16 if recipe in ("mxfp4", "nvfp4", "mixed") else torch.float32
    mixed = MIXED["compressed-tensors"] | {"*.o_proj": "int4-g64"}
    source = quantized("llama", mixed if recipe == "mixed" else {"*.layers.*": recipe}, dtype)
    given, _ = write(source, "compressed-tensors", tmp_path / "new")
    theirs = reference(tmp_path / "new", source)
    one, two = logits(theirs), logits(load(tmp_path / "new", progress=False))
    # Ranges of 8-bit inputs are 255 / 2 steps there.
    assert (one - two).norm() < (1e-2 if dtype == torch.bfloat16 or recipe == "int8+int8" else 1e-5) * two.norm()
    for name, (scheme, planes) in given.parts.items():
        weight, matrix = theirs.get_submodule(name).weight.float(), given.contents.matrices[name]
        ours = dequantize(planes, scheme, matrix.n, matrix.k)
        assert (weight - ours).abs().max() <= (2.0**-7 if dtype == torch.bfloat16 else 0) * ours.abs().max()


@pytest.mark.parametrize("recipe", ["nf4", "nf4-dq", "fp4", "llm-int8", "mixed"])
def test_transformers_reads_bitsandbytes(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = quantized("llama", MIXED["bitsandbytes"] if recipe == "mixed" else {"*.layers.*": recipe})
    given, _ = write(source, "bitsandbytes", tmp_path / "new")
    model = reference(tmp_path / "new", source)
    theirs, ours = logits(model), logits(load(tmp_path / "new", progress=False))
    assert (theirs - ours).norm() < 0.01 * ours.norm()
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {name for name in kept | given.parts.keys() if name not in given.parts}


def test_transformers_reads_gpt_oss(tmp_path: Path) -> None:
    path = next(path for path in DIRECTORIES if method(path) == "gpt-oss")
    source = source_in(path)
    write(source, "gpt-oss", tmp_path / "new")
    import transformers

    config = transformers.Mxfp4Config(dequantize=True)
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(tmp_path / "new", quantization_config=config, dtype=torch.float32)
    ours = load(tmp_path / "new", dtype=torch.float32, progress=False)
    one, two = logits(theirs), logits(ours)
    assert (one - two).norm() < 1e-4 * two.norm()


def test_gpt_oss_is_for_gpt_oss() -> None:
    source = quantized("llama", {"*.layers.*": "mxfp4"})
    with pytest.raises(FileError, match="this is llama"):
        list(WRITERS["gpt-oss"].units(source.contents))
