"""Float zeros and biases of one level, both signs of a scale, permuted columns, and what cannot be quantized."""

from dataclasses import replace

import pytest
import torch
from awkward_weights import DTYPES, KINDS, MAGNITUDES, awkward
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_reference import assert_nearest, block_errors, decoded, parts
from torch import Tensor

from fxquant.codecs import dequantize, quantize, squared_error
from fxquant.codecs.residuals import Sums
from fxquant.errors import SchemeError
from fxquant.scheme import Scheme

SPELLINGS = [
    "uint4-g64-fzero-fp16", "uint2-g16-fzero", "uint8-fzero", "int4-g8-fzero-fp32", "uint3-b3x5-fzero-fp16",
    "uint4-flat33-fzero-fp16", "uint5-tensor-fzero-fp16", "q4_1", "q5_1", "uint2-g16-bias-bf16", "int3-g8-bias-fp32",
    "uint4-b4x7-bias-fp16", "uint6-flat40-bias", "uint8-row-bias-fp16",
]  # fmt: skip
spellings, kinds = st.sampled_from(SPELLINGS), st.sampled_from(list(KINDS))
seeds, searches = st.integers(0, 2**31), st.sampled_from(["absmax", "minmax", "least_squares", "hqq"])


def weight_for(scheme: Scheme, seed: int, n: int, k: int, dtype: torch.dtype, magnitude: float, kind: str) -> Tensor:
    if scheme.misfit(n, k):
        k = max(k // 10, 1) * scheme.block.columns
    return awkward(seed, n, k, dtype, magnitude, kind)


cases = st.tuples(
    spellings,
    seeds,
    st.integers(1, 12),
    st.integers(1, 90),
    st.sampled_from(DTYPES),
    st.sampled_from(MAGNITUDES),
    kinds,
)


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=150)
@given(cases, searches)
def test_codes_are_nearest_and_decode_as_defined(case, search):
    spelling, *rest = case
    scheme = Scheme.parse(spelling)
    weight = weight_for(scheme, *rest)
    planes = quantize(weight, scheme, search)
    n, k = weight.shape
    result, meant = dequantize(planes, scheme, n, k), decoded(planes, scheme, n, k)
    scale, zero, bias = parts(planes, scheme, n, k)
    assert result.isfinite().all()
    size = meant.abs() + bias.abs() + (zero * scale).abs()
    assert ((result.double() - meant).abs() <= 4e-7 * size + 1e-37).all()
    assert_nearest(weight, planes, scheme)


@settings(deadline=None, max_examples=150)
@given(cases)
def test_least_squares_is_never_worse_than_a_range(case):
    spelling, *rest = case
    scheme = Scheme.parse(spelling)
    weight = weight_for(scheme, *rest)
    searched, norm = block_errors(weight, quantize(weight, scheme), scheme, scheme.block)
    for search in ("absmax", "minmax"):
        spanning, _ = block_errors(weight, quantize(weight, scheme, search), scheme, scheme.block)
        assert (searched <= spanning * (1 + 1e-4) + norm * 1e-10 + 1e-70).all()


@settings(deadline=None, max_examples=100)
@given(spellings, seeds, st.sampled_from([1e-3, 1.0, 100.0]), kinds)
def test_the_range_clips_nothing(spelling, seed, magnitude, kind):
    """Every weight within half a step."""
    scheme = replace(Scheme.parse(spelling), scale="fp32")
    weight = weight_for(scheme, seed, 8, 70, torch.float32, magnitude, kind)
    for search in ("absmax", "minmax"):
        planes = quantize(weight, scheme, search)
        scale, zero, bias = parts(planes, scheme, *weight.shape)
        slack = 1e-6 * (weight.abs() + bias.abs() + (zero * scale).abs()) + 1e-37
        assert ((weight - decoded(planes, scheme, *weight.shape)).abs() <= scale * (0.5 + 1e-4) + slack).all()


@pytest.mark.parametrize("spelling", ["uint4-g32-fzero-fp16", "uint4-g32-bias-fp16"])
def test_a_range_far_from_zero_costs_no_codes(spelling):
    scheme, weight = Scheme.parse(spelling), gaussian(16, 256) * 0.1 + 3
    errors = {s: squared_error(weight, quantize(weight, scheme, s), scheme) for s in ("absmax", "minmax")}
    assert errors["minmax"] < errors["absmax"] / 20


@pytest.mark.parametrize("search", ["absmax", "minmax"])
def test_without_an_offset_both_ranges_are_the_same(search):
    for spelling in ("int4-g32", "nf4", "fp8", "mxfp4", "int4-g32-asym", "nvfp4", "q6_k"):
        scheme, weight = Scheme.parse(spelling), gaussian(4, 256)
        ours, absmax = quantize(weight, scheme, search), quantize(weight, scheme, "absmax")
        assert all(torch.equal(ours[name], absmax[name]) for name in absmax)


def alternating(weight: Tensor, bits: int, starts: int = 60) -> float:
    """The squared error that codes and regression reach, by turns to the end, from many ranges, in float64."""
    w, top = weight.double(), 2**bits - 1
    least = torch.full(w.shape[:1], torch.inf, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(starts):
        ends = w.mean(1, keepdim=True) + torch.rand(len(w), 2, generator=generator).mul(0.8).add(0.3) * torch.stack(
            ((w - w.mean(1, keepdim=True)).amin(1), (w - w.mean(1, keepdim=True)).amax(1)), 1
        )
        scale, bias = (ends[:, 1:] - ends[:, :1]) / top, ends[:, :1]
        for _ in range(8):
            q = ((w - bias) / scale).round().clamp(0, top)
            centred = q - q.mean(1, keepdim=True)
            scale = (centred * w).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True)
            bias = w.mean(1, keepdim=True) - scale * q.mean(1, keepdim=True)
        q = ((w - bias) / scale).round().clamp(0, top)
        least = torch.minimum(least, (w - scale * q - bias).square().sum(1).nan_to_num(torch.inf))
    return (least.sum() / w.square().sum()).item()


@pytest.mark.parametrize(("bits", "group", "above"), [(2, 16, 1.06), (3, 32, 1.06), (4, 32, 1.06), (5, 32, 1.06)])
def test_the_search_comes_close_to_an_exhaustive_one(bits, group, above):
    weight = gaussian(64, 32 * group)
    scheme = Scheme.parse(f"uint{bits}-g{group}-bias-fp32")
    error = squared_error(weight, quantize(weight, scheme), scheme)
    assert error <= above * alternating(weight.view(-1, group), bits)


@settings(deadline=None, max_examples=60)
@given(seeds, st.booleans())
def test_regression_is_the_one_of_lapack(seed, bounded):
    """`Sums.step` against a least-squares solver; with a bound on the bias, against the solution on the bound."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 6, (20,), generator=generator).double()
    e = torch.randn(20, generator=generator).double() + 0.3 * q
    one = torch.ones_like(q)
    sums = Sums(20, *(x.sum().view(1) for x in (q * q, q * e, e * e, q, e)))
    free = torch.linalg.lstsq(torch.stack((q, one), 1), e.unsqueeze(1)).solution.flatten()
    highest = free[1:] - 0.25 if bounded else None
    slope, bias = sums.step(highest)
    expected = free if highest is None else torch.cat(((q * (e - highest)).sum().view(1) / (q * q).sum(), highest))
    torch.testing.assert_close(torch.cat((slope, bias)), expected)
    torch.testing.assert_close(sums.after(slope, bias), (e - slope * q - bias).square().sum().view(1))


@pytest.mark.parametrize(
    ("spelling", "percent"),
    [
        ("int2-g64", 12.5), ("int3-g64", 3.2), ("int4-g64", 0.81), ("nf4-g64", 0.73), ("int3-g128", 3.46),
        ("int2-g32", 11.0), ("uint4-g64-fzero-fp16", 0.68), ("uint2-g64-fzero-fp16", 10.4), ("iq4-g32-fp16", 0.55),
        ("table(-1,0,1,2)-g64", 12.5), ("q4_1", 0.50), ("q5_1", 0.117),
    ],
)  # fmt: skip
def test_error_on_normal_weights(spelling, percent):
    weight, scheme = gaussian(128, 4096), Scheme.parse(spelling)
    assert squared_error(weight, quantize(weight, scheme), scheme) * 100 <= percent


def test_few_integers_take_either_sign():
    """The largest weight is positive here, and yet one more code below zero is worth more."""
    weight = torch.tensor([[2.1, -2.0, -2.0, -2.0, 1.0, 1.0, -1.0, 0.0]])
    planes = quantize(weight, Scheme.parse("int2-g8-fp32"))
    assert planes["scales"].item() > 0
    assert quantize(-weight, Scheme.parse("int2-g8-fp32"))["scales"].item() < 0


def test_permuted_columns_share_groups_with_their_like():
    weight = gaussian(64, 512)
    weight[:, ::37] *= 30
    scheme, plain = Scheme.parse("int4-g64-perm"), Scheme.parse("int4-g64")
    planes = quantize(weight.half(), scheme)
    norms = weight.half().double().square().sum(0)[planes["perm"].long()]
    assert planes["perm"].dtype == torch.int32
    assert sorted(planes["perm"].tolist()) == list(range(512))
    assert (norms[:-1] >= norms[1:] * (1 - 1e-5)).all()
    assert_nearest(weight.half()[:, planes["perm"].long()], planes, scheme)
    assert squared_error(weight, planes, scheme) < 0.6 * squared_error(weight, quantize(weight, plain), plain)
    meant = decoded(planes, scheme, 64, 512)
    result = dequantize(planes, scheme, 64, 512)[:, planes["perm"].long()]
    torch.testing.assert_close(result.double(), meant, rtol=1e-6, atol=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_columns_of_any_magnitude_are_ordered(magnitude):
    weight = torch.ones(300, 8) * torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 4.0, 5.0, 0.5]) * magnitude
    planes = quantize(weight, Scheme.parse("int8-g4-perm-fp32"))
    assert planes["perm"].tolist() == [4, 6, 5, 1, 2, 0, 7, 3]


@pytest.mark.parametrize("shape", [(0, 64), (3, 64)])
def test_what_is_not_calibrated_is_defined(shape):
    scheme = Scheme.parse("int4-g64-perm+int8-static")
    planes = quantize(torch.zeros(shape), scheme)
    assert planes["input_scale"].item() == 1.0
    assert planes["perm"].tolist() == list(range(64))


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("vq8x4s7-g32-odd4*fp16.g256", "consists of vectors"), ("iq1_s", "only be read"),
        ("int4-g32-colscale", "colscale cannot be told"), ("int4-g32-perm-colbias", "colbias cannot be told"),
        ("nf4-colscale-colbias", "colscale and colbias"),
    ],
)  # fmt: skip
def test_what_a_weight_does_not_tell_cannot_be_quantized(spelling, words):
    scheme = Scheme.parse(spelling)
    assert not scheme.encodable
    with pytest.raises(SchemeError, match=words):
        quantize(torch.empty(1 << 20, 1 << 20, device="meta"), scheme)


def test_double_quantization_keeps_integer_zeros():
    weight, scheme = gaussian(64, 256) + 1, Scheme.parse("int4-flat64-asym-dq")
    assert squared_error(weight, quantize(weight, scheme), scheme) < 0.01
    with pytest.raises(SchemeError, match="second level of its own"):
        Scheme.parse("uint4-flat64-fzero-dq")


def test_planes_may_be_strided_and_weights_too():
    for spelling in ("uint4-g32-fzero-fp16", "q4_1", "q4_k", "nvfp4", "int4-g32-perm"):
        scheme, weight = Scheme.parse(spelling), gaussian(256, 40).t()
        expected = quantize(weight.contiguous(), scheme)
        out = {
            name: torch.empty((*spec.shape, 2), dtype=spec.dtype)[..., 0]
            for name, spec in scheme.planes(40, 256).items()
        }
        quantize(weight, scheme, out=out)
        assert all(torch.equal(out[name], plane) for name, plane in expected.items())
