"""Directories that real libraries wrote are recognized, and every matrix in them decodes to what it should."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_directories import SETTINGS, ZOO, read, write_checkpoint, write_extract
from safetensors.torch import load_file
from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles, open_checkpoint
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError
from fxquant.families import FAMILIES, FULL_PRECISION, find_weights

# A folder with whole checkpoints, each with `expected.safetensors` and `meta.json`.
DIRECTORIES = os.environ.get("FXQUANT_ZOO_DIRECTORIES")
WHOLE = sorted(p.parent for p in Path(DIRECTORIES).glob("*/model.safetensors")) if DIRECTORIES else []
FAMILY = {
    "autoround": "auto-round",
    "awq": "awq",
    "bnb": "bitsandbytes",
    "ct": "compressed-tensors",
    "fp8": "fp8",
    "gptoss": "mxfp4",
    "gptq": "gptq",
    "hqq": "hqq",
    "modelopt": "modelopt",
    "moe_qwen3_ct": "compressed-tensors",
    "moe_qwen3_fp8": "fp8",
    "quanto": "quanto",
    "quark": "quark",
    "torchao": "torchao",
}


def family_by_name(name: str) -> str:
    return FAMILY[max((prefix for prefix in FAMILY if name.startswith(prefix)), key=len)]


def check(files: CheckpointFiles, expected: dict[str, Tensor], tolerance: float) -> None:
    """Every matrix decodes to within so many units in the last place of the largest."""
    weights = {weight.name: weight for weight in find_weights(files)[1]}
    for module, values in expected.items():
        scheme, planes = read(files, weights[module], *values.shape)
        found = dequantize(planes, scheme, *values.shape)
        if tolerance == 0:
            assert torch.equal(found, values), module
        else:
            assert (found - values).abs().max() <= tolerance * 2.0**-23 * values.abs().max(), module


def test_settings_and_linears_are_of_the_same_checkpoints() -> None:
    assert sorted(SETTINGS) == sorted(p.stem for p in ZOO.glob("*.safetensors") if not p.stem.startswith("gguf"))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_linear_of_every_checkpoint(name: str, tmp_path: Path) -> None:
    files, about, expected = write_extract(tmp_path, name)
    family, weights = find_weights(files)
    assert family == family_by_name(name)
    assert {weight.name for weight in weights} == set(expected)
    check(files, expected, about["tolerance"])


def expected_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for key, values in load_file(folder / "expected.safetensors").items():
        module = key.removesuffix(".weight")
        if "logits" in key or key == "input_ids":
            continue
        if not folder.name.startswith("gptoss"):
            yield module, values
            continue
        parent, _, projection = module.rpartition(".")
        for expert, value in enumerate(values):
            if projection == "gate_up_proj":
                yield f"{parent}.{expert}.gate_proj", value.t()[0::2]
                yield f"{parent}.{expert}.up_proj", value.t()[1::2]
            else:
                yield f"{parent}.{expert}.{projection}", value.t()


@pytest.mark.skipif(not WHOLE, reason="FXQUANT_ZOO_DIRECTORIES names no folder of checkpoints")
@pytest.mark.parametrize("folder", WHOLE, ids=lambda path: path.name)
def test_every_matrix_of_whole_checkpoints(folder: Path) -> None:
    files = open_checkpoint(folder)
    family, weights = find_weights(files)
    assert family == family_by_name(folder.name)
    tolerance = json.loads((folder / "meta.json").read_text())["tolerance"]["weights"]
    check(files, dict(expected_of(folder)), tolerance)
    # Of these models, all but embeddings, the head, routers and norms is quantized.
    plain = {piece.name for weight in weights for piece in weight.pieces.values()}
    left = [n for n in files.headers.keys() - plain if n.endswith("_proj.weight") and not folder.name.startswith("gpt")]
    assert left == []


def test_full_precision(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 4), "a.position_ids": torch.zeros(4, dtype=torch.int32)}
    assert find_weights(write_checkpoint(tmp_path, tensors)) == (FULL_PRECISION, [])


WITHOUT_WEIGHT = ("auto", "awq", "gptq", "ct_mx", "ct_nv", "ct_w4", "moe_qwen3_ct", "quanto", "hqq")
"""Checkpoints that call no tensor of a quantized module `weight`."""
LEFT_OVER = {
    "a.weight": torch.zeros(4, 4, dtype=torch.int8),
    "b.weight_scale": torch.ones(4),
    "c.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
    "d.weight.absmax": torch.ones(4),
    "e.gate_up_proj_scale_inv": torch.ones(4),
    "f.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
}


@pytest.mark.parametrize("name", LEFT_OVER)
@pytest.mark.parametrize("with_config", [False, True])
def test_what_looks_quantized_is_claimed_or_refused(name: str, with_config: bool, tmp_path: Path) -> None:
    if not with_config:
        files = write_checkpoint(tmp_path, {name: LEFT_OVER[name]})
    else:
        files, *_ = write_extract(tmp_path / "from", "gptq_w4_g128")
        tensors = {key: files.tensor(key) for key in files.headers} | {name: LEFT_OVER[name]}
        config = files.config["quantization_config"]
        files = write_checkpoint(tmp_path / "to", tensors, config)
    with pytest.raises(CheckpointError, match=f"1 of its tensors look quantized in another way: {name}"):
        find_weights(files)


@pytest.mark.parametrize("method", FAMILIES)
def test_a_config_without_quantized_tensors(method: str, tmp_path: Path) -> None:
    settings = {"quant_method": method, "bits": 4, "group_size": 64, "load_in_4bit": True, "nbits_per_codebook": 8}
    settings |= {
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "pack-quantized"}}
    }
    files = write_checkpoint(tmp_path, {"a.weight": torch.zeros(4, 4)}, settings)
    with pytest.raises(CheckpointError, match="no tensor of it is"):
        find_weights(files)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptqq", "did you mean gptq"),
        ("higgs", "what can be read: aqlm"),
        (7, "it has to be a string"),
        (None, "there is no quant_method"),
    ],
)
def test_unknown_formats(method: object, message: str, tmp_path: Path) -> None:
    files = write_checkpoint(tmp_path, {"a.weight": torch.zeros(4, 4)}, {"quant_method": method, "x": 1})
    with pytest.raises(CheckpointError, match=message):
        find_weights(files)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith(WITHOUT_WEIGHT)])
def test_a_plain_weight_beside_the_quantized_one(name: str, tmp_path: Path) -> None:
    files, _, expected = write_extract(tmp_path / "from", name)
    (module,) = expected
    tensors = {key: files.tensor(key) for key in files.headers}
    assert f"{module}.weight" not in tensors
    tensors[f"{module}.weight"] = expected[module]
    sides = SETTINGS[name]["files"]
    again = write_checkpoint(tmp_path / "to", tensors, files.config.get("quantization_config"), files=sides)
    with pytest.raises(CheckpointError, match="twice"):
        find_weights(again)
