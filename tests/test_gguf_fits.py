"""Which schemes GGUF's types hold, and which are nearest to others."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.checkpoint_contents import Fit, Matrix
from fxquant.checkpoints import planes_of_gguf
from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.codecs import dequantize, quantize
from fxquant.errors import CheckpointError, FileError
from fxquant.gguf import gguf_fit, gguf_rows, gguf_type
from fxquant.scheme import NAMES, Scheme


def fit(spelling: str, n: int = 64, k: int = 512) -> Fit:
    matrix = Matrix("x", "model.layers.0.mlp.up_proj", n, k, Scheme.parse(spelling))
    return gguf_fit({"x": matrix}, "llama")["x"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_type_holds_its_scheme(name: str) -> None:
    scheme = Scheme.parse(LAYOUTS[name].scheme)
    assert gguf_type(scheme) == name
    assert fit(str(scheme)) == Fit(scheme)


EXACT = {
    "int4-fp16": "Q4_0",
    "int4-g64-fp16": "Q4_0",
    "int4-row-fp16": "Q4_0",
    "int4-tensor-fp16": "Q4_0",
    "int4-b64x96-fp16": "Q4_0",
    "uint4-g64-bias-fp16": "Q4_1",
    "int5-row-fp16": "Q5_0",
    "int8-row-fp16": "Q8_0",
    "int8-b3x64-fp16": "Q8_0",
    "e2m1-g64-e8m0": "MXFP4",
    "ternary-tensor-fp16": "TQ2_0",
    "iq4-g96-fp16": "IQ4_NL",
}


@pytest.mark.parametrize("spelling", EXACT)
@settings(max_examples=8, deadline=None)
@given(n=st.integers(2, 9), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_scales_of_larger_blocks_are_spread(spelling: str, n: int, blocks: int, seed: int) -> None:
    scheme, name = Scheme.parse(spelling), EXACT[spelling]
    k = blocks * (384 if LAYOUTS[name].size < 256 else 256)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    planes = quantize(weight, scheme)
    rows = gguf_rows(planes, scheme, n, k)
    found, again = planes_of_gguf(rows, name, n, k)
    assert torch.equal(dequantize(again, found, n, k), dequantize(planes, scheme, n, k))
    assert gguf_type(scheme) == name
    assert fit(spelling, n, k) == Fit(scheme)


NEAREST = {
    # the same codes, other scales
    "int4": "int4-fp16",
    "int8": "int8-fp16",
    "int4-g64-asym": "uint4-g64-bias-fp16",
    "uint4": "uint4-bias-fp16",
    "int4-g64-bias": "uint4-g64-bias-fp16",
    "int5-asym": "uint5-bias-fp16",
    "bitnet": "ternary-tensor-fp16",
    # as many bits
    "int4-g16": "q4_k",
    "int4-perm": "q4_k",
    "int3": "q3_k",
    "int2-asym": "q2_k",
    "int6-asym": "q6_k",
    "int8-asym": "q8_0",
    "nf4": "iq4_xs",
    "nf4-dq": "iq4_xs",
    "fp4": "q4_k",
    "fp8": "q8_0",
    "fp8-b128x128": "q8_0",
    "mxfp8": "q8_0",
    "mxfp6": "q6_k",
    "iq2_xxs": "q2_k",
    "iq3_s": "q3_k",
}


@pytest.mark.parametrize("spelling", NEAREST)
def test_the_nearest(spelling: str) -> None:
    found = fit(spelling)
    assert str(found.scheme) == str(Scheme.parse(NEAREST[spelling]))
    assert str(Scheme.parse(spelling)) in found.reason
    assert str(found.scheme) in found.reason


def test_the_nearest_of_small_blocks() -> None:
    for spelling, name in (
        ("int3", "q4_0"),
        ("int5-g16", "q5_1"),
        ("int6", "q8_0"),
        ("nf4", "iq4_nl"),
        ("q4_k", "q4_0"),
    ):
        assert str(fit(spelling, k=96).scheme) == name


def test_the_nearest_adds_little_error() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for spelling in NEAREST:
        scheme = Scheme.parse(spelling)
        near = fit(spelling).scheme
        assert near is not None
        if not scheme.encodable:
            continue
        value = dequantize(quantize(weight, scheme), scheme, 64, 512)
        again = dequantize(quantize(value, near), near, 64, 512)
        error = float((again - value).square().sum() / value.square().sum())
        assert error < (2e-4 if "fp16" in str(near) else 1e-4 if str(near) == "q8_0" else 6e-3), spelling


@pytest.mark.parametrize("spelling", ["int4", "nf4", "q8_0", "mxfp4"])
def test_what_fits_no_block_stays_in_full_precision(spelling: str) -> None:
    assert fit(spelling, k=80) == Fit(None, "K=80 is no multiple of 32, and GGUF has no smaller blocks")
    found = fit(spelling, n=1)
    assert found.scheme is None
    assert "vector" in found.reason


def test_nvfp4_where_llama_cpp_has_all_of_it() -> None:
    matrix = {"x": Matrix("x", "x", 64, 512, Scheme.parse("nvfp4"))}
    for model_type in ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe"):
        assert gguf_fit(matrix, model_type)["x"] == Fit(Scheme.parse("nvfp4"))
    for model_type in ("", "qwen2", "gemma2", "gpt_oss"):
        found = gguf_fit(matrix, model_type)["x"]
        assert (str(found.scheme), "leaves out the second level" in found.reason) == ("q4_k", True)
    with pytest.raises(FileError, match="'phi' are not written"):
        gguf_fit(matrix, "phi")


def test_activations_are_left_out() -> None:
    found = fit("int8-row-fp16+int8")
    assert (str(found.scheme), "activations" in found.reason) == ("int8-fp16", True)
    assert fit("int8+int8").scheme == Scheme.parse("int8-fp16")


@pytest.mark.parametrize("spelling", sorted({*NAMES, "int4-dq-flat64", "uint8-fzero", "fp8e5m2", "mxfp8e5m2"}))
@pytest.mark.parametrize("k", [32, 64, 96, 256])
def test_every_scheme_fits_somehow(spelling: str, k: int) -> None:
    found = fit(spelling, k=k).scheme
    assert found is not None
    name = gguf_type(found)
    assert name is not None
    assert k % LAYOUTS[name].size == 0
    assert fit(str(found), k=k) == Fit(found)


def experts(*spellings: str, owner: str = "model.layers.0.mlp.experts", k: int = 256) -> dict[str, Matrix]:
    names = [f"{owner}.{e}.up_proj" for e in range(len(spellings))]
    return {
        f"hub.{name}": Matrix(f"hub.{name}", name, 32, k, Scheme.parse(one))
        for name, one in zip(names, spellings, strict=True)
    }


def test_experts_of_one_tensor_get_one_type() -> None:
    found = gguf_fit(experts("q4_k", "q8_0", "int4"))
    assert {str(one.scheme) for one in found.values()} == {"q8_0"}
    assert [bool(one.reason) for one in found.values()] == [True, False, True]
    same = gguf_fit(experts("int4-g64-fp16", "int4-fp16", "q4_0"))
    assert [str(one.scheme) for one in same.values()] == ["int4-g64-fp16", "int4-fp16", "q4_0"]
    assert not any(one.reason for one in same.values())
    assert {one.scheme for one in gguf_fit(experts("q4_0", "q8_0", k=80)).values()} == {None}


def test_experts_that_are_not_all_quantized_stay_in_full_precision() -> None:
    whole = experts("q4_0", "q4_0", "q4_0", owner="model.layers.1.mlp.experts")
    part = dict(itertools.islice(experts("q4_0", "q4_0").items(), 2))
    found = gguf_fit(part | whole)
    assert [one.scheme is None for one in found.values()] == [True, True, False, False, False]
    assert all("2 of 3" in found[key].reason for key in part)


def test_planes_that_have_no_type() -> None:
    scheme = Scheme.parse("nf4")
    with pytest.raises(CheckpointError, match="no type for a nf4 weight"):
        gguf_rows({}, scheme, 32, 256)
    with pytest.raises(CheckpointError, match="K=96"):
        gguf_rows({}, Scheme.parse("q4_k"), 32, 96)
