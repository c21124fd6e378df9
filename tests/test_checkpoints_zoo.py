"""Linears out of checkpoints that the real libraries wrote decode to what those libraries decode them to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fxquant.checkpoints as checkpoints
from fxquant.checkpoints import Planes, gguf_of_planes
from fxquant.codecs import dequantize

# Another folder that tests/data/zoo/extract.py wrote, say one with all linears.
ZOO = Path(os.environ.get("FXQUANT_ZOO", Path(__file__).parent / "data" / "zoo"))
FILES = sorted(ZOO.glob("*.safetensors"))


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    linears: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            module, _, name = key.rpartition("/")
            linears.setdefault(module, {})[name] = file.get_tensor(key)
        return json.loads(file.metadata()["about"]), linears


def planes_of(about: dict[str, Any], tensors: dict[str, Tensor], n: int, k: int) -> Planes:
    settings = dict(about["settings"])
    if about["call"] == "gguf":
        return checkpoints.planes_of_gguf(tensors["blocks"], settings["type_name"], n, k)
    if about["call"] == "torchao":
        settings["block_size"] = (1, k)
    return getattr(checkpoints, f"planes_of_{about['call']}")(tensors, n, k, **settings)


def in_model_order(rows: Tensor, module: str, heads: tuple[int, int]) -> Tensor:
    """llama.cpp permutes the rows of q and k; this undoes it for anything that has one row per row of the weight."""
    if not module.endswith(("q_proj", "k_proj")):
        return rows
    count = heads[module.endswith("k_proj")]
    return rows.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)


def test_there_is_a_zoo() -> None:
    assert len(FILES) == 31


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_decodes_as_the_reference(path: Path) -> None:
    about, linears = read(path)
    for module, tensors in linears.items():
        expected = tensors.pop("expected")
        n, k = expected.shape
        scheme, planes = planes_of(about, tensors, n, k)
        if about["call"] == "gguf":
            assert torch.equal(gguf_of_planes(planes, scheme), tensors["blocks"])
            planes = {name: in_model_order(plane, module, about["heads"]) for name, plane in planes.items()}
        found = dequantize(planes, scheme, n, k)
        if about["tolerance"] == 0:
            assert torch.equal(found, expected), (module, (found - expected).abs().max())
        else:
            assert about["unit"] == "ulp32 of max|W|"
            assert (found - expected).abs().max() <= about["tolerance"] * 2.0**-23 * expected.abs().max(), module


SCHEMES = {
    "bnb_nf4": "nf4",
    "bnb_nf4_dq": "nf4-dq",
    "ct_mxfp4": "mxfp4",
    "ct_nvfp4": "nvfp4",
    "ct_w4a16_g128": "int4",
    "fp8_block128_tail": "fp8-b128x128-fp32",
    "gguf_q4_k": "q4_k",
    "gptq_w4_g64_actorder": "int4-g64-fp16-perm",
    "gptq_w4_g64_asym_zero0": "uint4-g64-fp16",
    "hqq_4bit_g64": "uint4-g64-fzero",
    "quanto_int4": "uint4-g96-bias",
}


@pytest.mark.parametrize(("name", "spelling"), SCHEMES.items())
def test_schemes_are_the_smallest_that_fit(name: str, spelling: str) -> None:
    about, linears = read(ZOO / f"{name}.safetensors")
    (tensors,) = list(linears.values())[:1]
    n, k = tensors.pop("expected").shape
    assert str(planes_of(about, tensors, n, k)[0]) == spelling


def test_whole_words_matter() -> None:
    """A file of GPTQModel that has zero points of 0 decodes to something else by AutoGPTQ's rule."""
    about, linears = read(ZOO / "gptq_w4_g64_asym_zero0.safetensors")
    for tensors in linears.values():
        expected = tensors.pop("expected")
        about["settings"]["by_gptqmodel"] = False
        scheme, planes = planes_of(about, tensors, *expected.shape)
        assert not torch.equal(dequantize(planes, scheme, *expected.shape), expected)
