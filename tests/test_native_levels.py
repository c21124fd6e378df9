"""The compiled codecs against plain torch where there is more than a scale: float zeros, biases, second levels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import codecs, native
from fxquant.codecs.double import double
from fxquant.scheme import Scheme

OFFSETS = (
    *("uint4-g64-fzero-fp16", "uint8-g24-fzero", "uint3-g8-fzero-bf16", "uint2-g17-fzero-fp16", "int4-row-fzero"),
    *("q4_1", "q5_1", "uint4-g128-bias", "uint2-g3-bias-fp16", "int4-g32-bias", "uint8-row-bias-bf16"),
    *("uint6-g40-bias", "uint4-flat24-fzero", "uint8-flat40-bias-fp16"),
)
LEVELED = (
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "int4-g32-u6*fp16.g64", "fp8-g32-i8*bf16.g128"),
    *("int4-g32-bias-i6*fp16.g128", "e2m3-g16-u6*fp32.g64", "uint3-g48-bias-u4*fp32.g96", "ternary-g16-i8*bf16.g64"),
)
GLOBAL = ("nvfp4", "int4-g16-e4m3*fp32", "int3-g32-e4m3*fp16", "table(-1,0,1,2)-g16-e4m3*bf16", "fp8-g32-e4m3*fp32")
DOUBLE = ("nf4-dq", "fp4-dq", "int8-flat24-dq", "int4-flat16-asym-dq", "uint4-flat64-dq")
EVERY = (*OFFSETS, *LEVELED, *GLOBAL, *DOUBLE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("compiled_codecs")


def empty(scheme: Scheme, n: int, k: int) -> dict[str, Tensor]:
    """Planes full of what no codec would write, so that a byte left out shows."""
    planes = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in scheme.planes(n, k).items()}
    for plane in planes.values():
        plane.view(torch.uint8).fill_(0xA5)
    return planes


def compiled_planes(weight: Tensor, scheme: Scheme, search: str) -> dict[str, Tensor]:
    planes = empty(scheme, *weight.shape)
    with native.from_size(0):
        assert native.quantize(weight, scheme, search, planes, double), "not covered"
    return planes


def plain_planes(weight: Tensor, scheme: Scheme, search: codecs.ScaleSearch) -> dict[str, Tensor]:
    with native.from_size(math.inf):
        return codecs.quantize(weight, scheme, search)


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, plane in expected.items():
        assert torch.equal(found[name].contiguous().view(torch.uint8), plane.contiguous().view(torch.uint8)), name


def weights(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal weights, and what makes arithmetic awkward."""
    generator = torch.Generator().manual_seed(seed)
    x, top = torch.randn(n, k, generator=generator), torch.finfo(dtype).max
    match kind:
        case "zeros":
            x = torch.where(torch.rand(n, 1, generator=generator) < 0.5, x, 0.0)
            x.view(-1)[:: max(k // 3, 1)] = -0.0
        case "constant":
            x = x[:, :1].expand(n, k).contiguous()
        case "ties":
            x = (2 * x).round() / 2
        case "tiny":
            x *= 1e-38 if dtype != torch.float16 else 1e-7
        case "huge":
            x = (x * (top / 8)).clamp(-top, top)
        case "positive":
            x = x.abs() + 3
        case "negative":
            x = -x.abs() - 3
        case "mixed":
            x *= torch.exp2(torch.randint(-40, 15, (n, k), generator=generator).float())
            x.clamp_(-top, top)
    return x.to(dtype)


KINDS = ("normal", "zeros", "constant", "ties", "tiny", "huge", "positive", "negative", "mixed")


def unit(scheme: Scheme) -> int:
    """Columns that a weight must have whole multiples of, so that rows end with a byte."""
    if scheme.outer is not None and scheme.outer.block.columns:
        return scheme.outer.block.columns
    return 8 if scheme.block.flat else scheme.block.columns or 1


@pytest.mark.parametrize("spelling", EVERY)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_choices_by_range_have_the_bits_of_plain_torch(spelling: str, data: st.DataObject) -> None:
    scheme, search = Scheme.parse(spelling), data.draw(st.sampled_from(("absmax", "minmax")))
    n, columns = data.draw(st.integers(1, 7)), unit(scheme)
    k = columns * data.draw(st.integers(1, max(2, 300 // columns)))
    weight = weights(data.draw(st.sampled_from(KINDS)), n, k, data.draw(st.sampled_from(DTYPES)))
    if not scheme.block.flat and data.draw(st.booleans(), "strided"):
        weight = torch.cat((weight, weight), 1)[:, 1 : k + 1] if data.draw(st.booleans()) else weight.repeat(2, 1)[::2]
    check_same(compiled_planes(weight, scheme, search), plain_planes(weight, scheme, search))


def distributions(n: int, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(n, k, generator=generator)
    chi = torch.randn(5, n, k, generator=generator).square().mean(0)
    outliers = torch.where(torch.rand(k, generator=generator) < 0.02, 20.0, 1.0)
    return {"normal": normal, "student": normal / chi.sqrt(), "outliers": normal * outliers}


SEARCHED = (
    *("uint4-g64-fzero-fp16", "uint2-g64-fzero-fp16", "q4_1", "q5_1", "uint4-g128-bias", "uint8-g128-bias-fp16"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "nvfp4", "nf4-dq", "int8-flat64-dq"),
)


@pytest.mark.parametrize("spelling", SEARCHED)
def test_a_search_is_as_good_as_that_of_plain_torch(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    for name, weight in distributions(64, 1024).items():
        found, plain = compiled_planes(weight, scheme, "least_squares"), plain_planes(weight, scheme, "least_squares")
        ratio = codecs.squared_error(weight, found, scheme) / codecs.squared_error(weight, plain, scheme)
        assert ratio < 1.003, (name, ratio)


def group_errors(weight: Tensor, planes: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """By what shares its highest level: blocks, groups of them, or the whole weight."""
    n, k = weight.shape
    with native.from_size(math.inf):
        off = (codecs.dequantize(planes, scheme, n, k).double() - weight.double()).square()
    if scheme.block.flat:
        padded = torch.nn.functional.pad(off.view(-1), (0, -off.numel() % scheme.block.columns))
        return padded.view(-1, scheme.block.columns).sum(1)
    if scheme.outer is not None and not scheme.outer.block.columns:
        return off.sum().view(1)
    return off.view(n, -1, scheme.outer.block.columns if scheme.outer else scheme.block.columns or k).sum(-1)


@pytest.mark.parametrize("spelling", EVERY)
@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(KINDS), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_search_never_has_a_larger_error_than_absmax(spelling: str, kind: str, blocks: int, seed: int) -> None:
    scheme = Scheme.parse(spelling)
    weight = weights(kind, 4, blocks * unit(scheme) * -(-24 // unit(scheme)), torch.float32, seed)
    found = group_errors(weight, compiled_planes(weight, scheme, "least_squares"), scheme)
    # Under double quantization every block can have its absmax scale as it is stored, where absmax takes the codes at
    # the scale before it is rounded.
    by_range = group_errors(weight, compiled_planes(weight, scheme, "absmax"), scheme)
    # Beyond float32's rounding of weights and of their squares.
    largest = weight.abs().amax().double()
    assert (found <= by_range * (1 + 1e-5) + 1e-11 * largest.square() * weight.shape[1]).all()


@pytest.mark.parametrize("spelling", ["q4_1", "uint4-g64-fzero-fp16", "q2_k", "q6_k", "nvfp4", "nf4-dq"])
@pytest.mark.usefixtures("threads")
def test_threads_change_nothing(spelling: str) -> None:
    scheme, weight, found = Scheme.parse(spelling), distributions(37, 5120)["student"], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(compiled_planes(weight, scheme, "least_squares"))
    check_same(found[1], found[0])
    check_same(compiled_planes(weight, scheme, "least_squares"), found[0])


@pytest.mark.parametrize("spelling", ["uint4-g16-fzero", "q4_1", "q4_k", "nvfp4"])
def test_strided_planes_are_written_in_place(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(6, 512)
    whole = {name: torch.cat((plane, plane)) for name, plane in empty(scheme, 6, 512).items()}
    rows = {name: plane[::2] if len(plane) > 2 else plane[:1] for name, plane in whole.items()}
    with native.from_size(0):
        assert native.quantize(weight, scheme, "absmax", rows)
    check_same(rows, plain_planes(weight, scheme, "absmax"))
    assert all((plane[1::2].contiguous().view(torch.uint8) == 0xA5).all() for plane in whole.values())


def test_planes_that_the_compiled_codecs_cannot_write() -> None:
    for spelling, name in (("uint4-g16-fzero", "zeros"), ("uint4-g16-bias", "biases"), ("q4_k", "bias_scales")):
        scheme = Scheme.parse(spelling)
        planes = empty(scheme, 6, 512)
        planes[name] = planes[name].repeat_interleave(2, 0)[::2]
        with native.from_size(0):
            assert not native.quantize(torch.randn(6, 512), scheme, "absmax", planes)


@pytest.mark.parametrize("spelling", ["q4_k", "nvfp4", "nf4-dq", "q4_1"])
def test_codecs_use_what_is_compiled(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise AssertionError("plain torch")

    weight, scheme = torch.randn(256, 512), Scheme.parse(spelling)
    monkeypatch.setattr("fxquant.codecs.encode.family_of", fails)
    for search in ("absmax", "least_squares"):
        check_same(codecs.quantize(weight, scheme, search), compiled_planes(weight, scheme, search))


@pytest.mark.parametrize(
    "spelling", ["int4-b4x8", "int4-g32-i8*fp16.g64-perm", "int4-g32-i8*fp16", "uint4-g24-bias-u6*fp16.g48"]
)
def test_what_is_not_covered_is_left_to_plain_torch(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(8, 768)
    planes = empty(scheme, *weight.shape)
    with native.from_size(0):
        assert not native.quantize(weight, scheme, "absmax", planes, double)
        check_same(planes, empty(scheme, *weight.shape))


@pytest.mark.parametrize("search", ["absmax", "least_squares"])
@pytest.mark.parametrize("size", [0, math.inf])
def test_powers_of_two_in_a_last_shorter_flat_block(search: codecs.ScaleSearch, size: float) -> None:
    weight, scheme = torch.randn(3, 40), Scheme.parse("e2m1-flat32-e8m0")
    with native.from_size(size):
        planes = codecs.quantize(weight, scheme, search)
    assert codecs.squared_error(weight, planes, scheme) < 0.03


@pytest.mark.parametrize("spelling", ["int4-g16", "nf4", "q4_1", "int4-g16-perm"])
def test_squared_errors_are_those_of_decoded_weights(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(131, 2048)
    planes = codecs.quantize(weight, scheme)
    off = codecs.dequantize(planes, scheme, 131, 2048).double() - weight
    expected = off.square().sum() / weight.double().square().sum()
    for size in (0, 1 << 16, math.inf):
        with native.from_size(size):
            assert codecs.squared_error(weight, planes, scheme) == pytest.approx(expected.item(), rel=1e-6)
