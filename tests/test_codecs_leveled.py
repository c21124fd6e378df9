"""Scales of two levels: nvfp4, GGUF's K-quants, and what else can be spelled."""

import ctypes
import math
import os

import pytest
import torch
from awkward_weights import DTYPES, KINDS, awkward
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_reference import assert_nearest, block_errors, codes, decoded, first_level, parts
from torch import Tensor

from fxquant import native
from fxquant.codecs import dequantize, quantize, squared_error
from fxquant.codecs.second_level import Groups
from fxquant.errors import SchemeError
from fxquant.scheme import NAMES, Scheme

K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
SPELLINGS = [
    *K_QUANTS, "nvfp4", "int4-g64-e4m3*fp32", "int4-g16-asym-i8*fp16.g64", "uint4-g16-u6*bf16.row",
    "int4-b2x8-i6*fp16.b4x16", "int4-g16-odd4*fp16.g64", "iq4-g16-u4*fp32", "nf4-flat16-e4m3*fp32",
    "int4-g16-bias-i8*fp16.g64", "uint3-g8-bias-e4m3*fp32.b3x0", "uint4-b3x5-bias-u6*bf16", "fp8-g16-i8*fp16.g64",
    "ternary-g16-u6*fp16.g64", "uint4-flat33-bias-u6*fp32", "int2-g16-e4m3*fp16.row-perm",
]  # fmt: skip
ENCODABLE = [name for name in NAMES if Scheme.parse(name).encodable]
spellings, kinds = st.sampled_from(SPELLINGS), st.sampled_from(list(KINDS))
seeds, searches = st.integers(0, 2**31), st.sampled_from(["absmax", "minmax", "least_squares"])
magnitudes = st.sampled_from([1e-38, 1e-5, 1.0, 1e4, 1e30])


def weight_for(scheme: Scheme, seed: int, n: int, k: int, dtype: torch.dtype, magnitude: float, kind: str) -> Tensor:
    k *= 13
    if scheme.misfit(n, k):
        columns = scheme.outer.block.columns if scheme.outer else 0
        k = max(k // 100, 1) * max(columns, scheme.block.columns)
    return awkward(seed, n, k, dtype, magnitude, kind)


cases = st.tuples(spellings, seeds, st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES), magnitudes, kinds)


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    outliers = gaussian(128, 2048, 1)
    outliers[:, torch.randperm(2048)[:20]] *= 20
    return {
        "normal": gaussian(128, 2048),
        "student": torch.distributions.StudentT(5.0).sample((128, 2048)),
        "outlier columns": outliers,
    }


def in_order(weight: Tensor, planes: dict[str, Tensor]) -> Tensor:
    return weight[:, planes["perm"].long()] if "perm" in planes else weight


@settings(deadline=None, max_examples=150)
@given(cases, searches)
def test_codes_are_nearest_and_decode_as_defined(case, search):
    spelling, *rest = case
    scheme = Scheme.parse(spelling)
    weight = weight_for(scheme, *rest)
    planes, (n, k) = quantize(weight, scheme, search), weight.shape
    assert {name: (tuple(p.shape), p.dtype) for name, p in planes.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in scheme.planes(n, k).items()
    }
    result, meant = in_order(dequantize(planes, scheme, n, k), planes), decoded(planes, scheme, n, k)
    _, _, bias = parts(planes, scheme, n, k)
    assert result.isfinite().all()
    assert ((result.double() - meant).abs() <= 4e-7 * (meant.abs() + bias.abs()) + 1e-37).all()
    assert_nearest(in_order(weight, planes), planes, scheme)


@settings(deadline=None, max_examples=150)
@given(cases)
def test_least_squares_is_never_worse_than_a_range(case):
    """In any group of blocks under one second-level number."""
    spelling, *rest = case
    scheme = Scheme.parse(spelling)
    weight = weight_for(scheme, *rest)
    planes = quantize(weight, scheme)
    searched, norm = block_errors(in_order(weight, planes), planes, scheme, scheme.outer.block)
    for search in ("absmax", "minmax"):
        planes = quantize(weight, scheme, search)
        spanning, _ = block_errors(in_order(weight, planes), planes, scheme, scheme.outer.block)
        assert (searched <= spanning * (1 + 1e-4) + norm * 1e-9 + 1e-70).all()


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ENCODABLE), seeds, st.integers(0, 5), st.sampled_from(DTYPES), magnitudes, kinds, searches)
def test_every_name_takes_every_weight(name, seed, n, dtype, magnitude, kind, search):
    scheme = Scheme.parse(name)
    weight = awkward(seed, n, 256, dtype, magnitude, kind) if n else torch.zeros(0, 256)
    planes = quantize(weight.t().contiguous().t(), scheme, search)
    result = dequantize(planes, scheme, n, 256)
    assert result.isfinite().all()
    if search == "least_squares" and 1e-3 < magnitude < 1e3:
        assert squared_error(weight, planes, scheme) <= 1


@pytest.mark.parametrize("search", ["absmax", "minmax", "least_squares"])
@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_k"])
def test_gguf_can_hold_the_minima(name, search):
    """Its blocks store `dmin >= 0` and codes without a sign, and subtract their product."""
    scheme = Scheme.parse(name)
    for kind in KINDS:
        planes = quantize(awkward(0, 4, 512, torch.float32, 1.0, kind), scheme, search)
        assert (planes["bias_scales"] <= 0).all()
        assert (planes["scale_scales"] >= 0).all()


def test_a_range_above_zero_needs_no_bias():
    weight = gaussian(2, 256).abs() + 1
    weight[0] = -weight[0]
    planes = quantize(weight, Scheme.parse("q4_k"), "minmax")
    fields = first_level(planes["biases"], "u6", 8)
    assert (fields[0] > 0).all()
    assert (fields[1] == 0).all()


def test_nvfp4_puts_the_largest_weight_at_the_top():
    scheme, weight = Scheme.parse("nvfp4"), gaussian(32, 256)
    planes = quantize(weight, scheme, "absmax")
    torch.testing.assert_close(planes["scale_scales"].view(()), weight.abs().max() / (6 * 448))
    largest = weight.abs().view(32, 16, 16).amax(2) / 6 / planes["scale_scales"]
    assert torch.equal(planes["scales"], largest.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(
    ("rows", "columns", "down", "across"), [(1, 40, 1, 40), (7, 12, 3, 4), (5, 8, 5, 8), (4, 6, 1, 2)]
)
def test_groups_reduce_and_spread(rows, columns, down, across):
    groups, values = Groups(rows, columns, down, across), gaussian(rows, columns)
    expected = torch.stack(
        [
            torch.stack([values[i : i + down, j : j + across].sum() for j in range(0, columns, across)])
            for i in range(0, rows, down)
        ]
    )
    torch.testing.assert_close(groups.reduce(values), expected)
    back = groups.spread(expected, values.shape)
    assert all(back[i, j] == expected[i // down, j // across] for i in range(rows) for j in range(columns))


# ggml's C quantizers (llama.cpp b4000 and later) on the very `weights()`, without an importance matrix: percent.
GGML = {
    "q4_0": (0.74146, 1.1761, 2.1713),
    "q4_1": (0.61677, 0.81661, 1.1933),
    "q5_0": (0.18259, 0.29284, 0.78149),
    "q5_1": (0.1439, 0.19065, 0.26927),
    "q8_0": (0.0028669, 0.004637, 0.012937),
    "q2_k": (8.862, 11.244, 6.4321),
    "q3_k": (2.2784, 3.1569, 2.2566),
    "q4_k": (0.51239, 0.69447, 0.979),
    "q5_k": (0.13056, 0.17881, 0.25238),
    "q6_k": (0.031484, 0.046773, 0.10331),
    "iq4_nl": (0.57997, 0.79527, 1.4656),
    "iq4_xs": (0.58903, 0.81168, 1.5121),
    "tq2_0": (65.238, 73.103, 28.918),
    "tq1_0": (65.238, 73.103, 28.918),
}


@pytest.mark.parametrize("name", sorted(GGML))
def test_error_is_below_ggml(name):
    scheme = Scheme.parse(name)
    for weight, percent in zip(weights().values(), GGML[name], strict=True):
        assert squared_error(weight, quantize(weight, scheme), scheme) * 100 <= percent


@pytest.mark.skipif("LIBGGML" not in os.environ, reason="LIBGGML does not name a build of ggml")
@pytest.mark.parametrize("name", sorted(GGML))
def test_ggml_has_the_errors_it_is_said_to_have(name):
    quants = pytest.importorskip("gguf.quants")
    for weight, percent in zip(weights().values(), GGML[name], strict=True):
        theirs = ggml(weight, name)
        error = (weight.double() - torch.from_numpy(quants.dequantize(*theirs)).double()).square().sum()
        assert error / weight.double().square().sum() * 100 == pytest.approx(percent, rel=1e-3)


def ggml(weight: Tensor, name: str) -> tuple:
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    library = ctypes.CDLL(os.environ["LIBGGML"])
    kind = gguf.GGMLQuantizationType[name.upper()]
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    n, k = weight.shape
    source, blocks = weight.contiguous(), numpy.zeros((n, k // per_block * size), numpy.uint8)
    counts = [ctypes.c_int64(count) for count in (0, n, k)]
    library.ggml_quantize_chunk(
        int(kind), ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(blocks.ctypes.data), *counts, None
    )
    return blocks, kind


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_error_is_below_torchao(name):
    pytest.importorskip("torchao")
    for weight in weights().values():
        theirs = torchao_nvfp4(weight) if name == "nvfp4" else torchao_mxfp4(weight)
        scheme = Scheme.parse(name)
        error = (weight.double() - theirs.double()).square().sum() / weight.double().square().sum()
        assert squared_error(weight, quantize(weight, scheme), scheme) < 0.97 * error


def torchao_nvfp4(weight: Tensor) -> Tensor:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    top = module.per_tensor_amax_to_scale(weight.abs().max())
    return module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=top).dequantize(torch.float32)


def torchao_mxfp4(weight: Tensor) -> Tensor:
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    return module.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def test_more_bits_are_better():
    for weight in weights().values():
        errors = [
            squared_error(weight, quantize(weight, scheme), scheme)
            for scheme in map(Scheme.parse, ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"))
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("compiled_from", [0, math.inf])
def test_a_band_knows_nothing_of_the_others(compiled_from):
    """However many rows there are: each has the planes that it has alone."""
    scheme, weight = Scheme.parse("q4_k"), gaussian(700, 512)
    with native.from_size(compiled_from):
        whole, part = quantize(weight, scheme), quantize(weight[650:653], scheme)
    assert all(torch.equal(whole[name][650:653], part[name]) for name in part)


def test_hqq_knows_one_level():
    with pytest.raises(SchemeError, match="two levels"):
        quantize(gaussian(2, 256), Scheme.parse("q4_k"), "hqq")


def test_codes_of_nvfp4_need_no_sign_of_the_scale():
    planes = quantize(gaussian(16, 256), Scheme.parse("nvfp4"))
    assert (planes["scales"] < 128).all()
    assert codes(planes, Scheme.parse("nvfp4"), 16, 256).unique().numel() > 12
