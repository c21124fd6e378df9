"""The hqq search against the hqq library, and where it does not apply."""

import pytest
import torch
from awkward_weights import DTYPES, KINDS, awkward
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_reference import assert_nearest, codes, owners
from torch import Tensor

from fxquant.codecs import SCALE_SEARCHES, dequantize, quantize, squared_error
from fxquant.errors import SchemeError
from fxquant.scheme import Scheme


def weight_of(kind: str, seed: int = 0, n: int = 96, k: int = 512) -> Tensor:
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(5.0).sample((n, k)) if kind == "student" else torch.randn(n, k)
    if kind == "outlier columns":
        weight[:, ::50] *= 20
    return weight * 0.02


def library(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros and the decoded weight of the hqq library."""
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    found, meta = quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
    )
    grid = (len(weight), -1)
    decoded = (found - meta["zero"]) * meta["scale"]
    return found.view(weight.shape), meta["scale"].view(grid), meta["zero"].view(grid), decoded.view(weight.shape)


@pytest.mark.parametrize("kind", ["normal", "student", "outlier columns"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_it_is_the_library(bits, group, kind):
    weight, scheme = weight_of(kind), Scheme.parse(f"uint{bits}-g{group}-fzero-fp32")
    planes = quantize(weight, scheme, "hqq")
    found, scale, zero, decoded = library(weight, bits, group)
    torch.testing.assert_close(planes["scales"], scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(planes["zeros"], zero, rtol=1e-5, atol=1e-5)
    same = codes(planes, scheme, *weight.shape) == found
    assert same.double().mean() > 0.9999
    torch.testing.assert_close(dequantize(planes, scheme, *weight.shape)[same], decoded[same], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "student", "outlier columns"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_least_squares_is_better_at_equal_bits(bits, kind):
    """The library's figure with float32 scales and zeros; ours have half the bits."""
    weight, scheme = weight_of(kind), Scheme.parse(f"uint{bits}-g64-fzero-fp16")
    _, _, _, decoded = library(weight, bits, 64)
    theirs = ((weight - decoded).double().square().sum() / weight.double().square().sum()).item()
    assert squared_error(weight, quantize(weight, scheme), scheme) < theirs
    assert squared_error(weight, quantize(weight, scheme), scheme) < squared_error(
        weight, quantize(weight, scheme, "hqq"), scheme
    )


spellings = st.sampled_from(
    [
        "uint4-g32-fzero-fp16",
        "uint2-flat33-fzero",
        "int4-g64-asym",
        "uint3-b3x5",
        "q4_1",
        "int8-asym",
        "int4-tensor-bias",
    ]
)


@settings(deadline=None, max_examples=100)
@given(
    spellings,
    st.integers(0, 2**31),
    st.sampled_from([1e-5, 0.02, 1e4]),
    st.sampled_from(DTYPES),
    st.sampled_from(list(KINDS)),
)
def test_codes_are_nearest_on_awkward_weights(spelling, seed, magnitude, dtype, kind):
    scheme, weight = Scheme.parse(spelling), awkward(seed, 7, 64, dtype, magnitude, kind)
    planes = quantize(weight, scheme, "hqq")
    assert dequantize(planes, scheme, 7, 64).isfinite().all()
    assert_nearest(weight, planes, scheme)


def test_integer_zeros_are_those_of_the_float_ones_rounded():
    weight = weight_of("normal") + 0.001
    rounded, free = (quantize(weight, Scheme.parse(s), "hqq") for s in ("uint4-g64-fp32", "uint4-g64-fzero-fp32"))
    zeros = codes(rounded, Scheme.parse("uint4-g64-fp32"), 96, 8, "zeros")
    assert torch.equal(rounded["scales"], free["scales"])
    assert torch.equal(zeros, free["zeros"].round().long())


def test_biases_are_zeros_times_scales():
    weight = weight_of("student")
    biased, free = (quantize(weight, Scheme.parse(s), "hqq") for s in ("uint4-g64-bias-fp32", "uint4-g64-fzero-fp32"))
    torch.testing.assert_close(biased["biases"], -free["zeros"] * free["scales"], rtol=1e-5, atol=1e-7)


def test_blocks_in_pieces_are_those_that_are_not():
    """A block of more weights than are worked on at a time."""
    weight = weight_of("normal", n=2, k=200_000)
    planes = quantize(weight, Scheme.parse("uint4-row-fzero-fp32"), "hqq")
    _, scale, zero, _ = library(weight, 4, 200_000)
    torch.testing.assert_close(planes["scales"], scale)
    torch.testing.assert_close(planes["zeros"], zero, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spelling", ["int4-g64", "nf4", "fp8", "mxfp4", "nvfp4", "ternary-tensor"])
def test_what_has_no_zero_has_none_to_optimise(spelling):
    with pytest.raises(SchemeError, match=r"hqq optimises the zeros .* has none: .* uint4-g64-fzero-fp16"):
        quantize(torch.empty(1 << 20, 1 << 20, device="meta"), Scheme.parse(spelling), "hqq")


@pytest.mark.parametrize("spelling", ["q2_k", "int4-flat64-asym-dq"])
def test_two_levels_are_one_too_many(spelling):
    with pytest.raises(SchemeError, match="two levels"):
        quantize(torch.zeros(4, 256), Scheme.parse(spelling), "hqq")


def test_no_other_name_is_a_search():
    with pytest.raises(SchemeError, match="no scale search is called 'hqqq'"):
        quantize(torch.zeros(4, 256), Scheme.parse("uint4"), "hqqq")
    assert {"absmax", "minmax", "least_squares", "hqq"} <= set(SCALE_SEARCHES)


def test_every_block_has_its_own_zero():
    weight = torch.zeros(6, 64)
    weight += torch.arange(6).unsqueeze(1) + torch.linspace(0, 0.1, 64)
    scheme = Scheme.parse("uint4-b2x32-fzero-fp32")
    planes = quantize(weight, scheme, "hqq")
    assert planes["zeros"].flatten()[owners(scheme.block, 6, 64)].unique().numel() == 6
