"""Compiled products of int8 codes with integer codes: those of the decoded numbers, in exact arithmetic."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from random_planes import random_planes
from torch import Tensor

from fxquant import codecs, native
from fxquant.activation_codecs import dequantize_activation, quantize_activation
from fxquant.native import matmul
from fxquant.ops import ABI
from fxquant.scheme import Scheme

# With what K is a multiple of.
SPELLINGS = {
    "int4-g128+int8": 128, "int4-g64-asym+int8": 64, "int4-g32+int8": 32, "int4-g16+int8": 16, "int4-row+int8": 1,
    "uint4-g32-bias+int8": 32, "q4_k+int8": 256, "int4-g128+int8-g64": 128, "int4-g128+int8-static": 128,
    "int8-row+int8": 1, "int8-g128+int8": 128, "int8-g32+int8": 32, "uint8-g64-asym+int8": 64,
    "int2-g32+int8": 32, "int3-g64+int8": 64, "int5-g32+int8": 32, "int6-row+int8": 1, "int8-row+int8-static": 1,
    "int4-g64+int8": 64, "int4-row-asym+int8-g32": 32, "int4-g256+int8-g64": 256,
    "int6-g16+int8-g16": 16, "int4-g48+int8": 48, "int8-g80-asym+int8": 80, "int4-g192+int8": 192, "int8-g16+int8": 16,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def multiplied(compiled_products: None) -> None:
    built = matmul.library()
    if built is None or not built.fxquant_multiplies_codes():
        pytest.skip("no AVX512-VNNI")


def planes_of(scheme: Scheme, n: int, k: int) -> dict[str, Tensor]:
    planes = random_planes(scheme, n, k, seed=k)
    if scheme.activation and scheme.activation.static:
        planes["input_scale"] = torch.tensor([0.02])
    return planes


def check(y: Tensor, x: Tensor, planes: dict[str, Tensor], scheme: Scheme, n: int, bias: Tensor | None) -> None:
    """Within the bound of `fxquant::linear` for what the codes of x stand for."""
    k = x.shape[-1]
    assert scheme.activation is not None
    codes, scales = quantize_activation(x, scheme.activation, planes.get("input_scale"))
    values = dequantize_activation(codes, scales, scheme.activation).double()
    with native.from_size(math.inf):
        weight = codecs.dequantize(planes, scheme, n, k).double()
    reference, magnitude = values @ weight.T, values.abs() @ weight.abs().T
    if bias is not None:
        reference, magnitude = reference + bias.double(), magnitude + bias.double().abs()
    info = torch.finfo(y.dtype)
    bound = (info.eps / 2 + (k + 8) * 2.0**-24) * magnitude + info.smallest_normal
    assert y.dtype == x.dtype
    assert ((y.double() - reference).abs() <= bound)[magnitude < info.max].all()


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_product_is_that_of_what_codes_stand_for(spelling: str, data: st.DataObject) -> None:
    scheme, unit = Scheme.parse(spelling), SPELLINGS[spelling]
    n = data.draw(st.integers(1, 140), "rows of the weight")
    k = unit * data.draw(st.integers(1, max(400 // unit, 3)), "units")
    rows = data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 13, 200)), "rows of x")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    planes = planes_of(scheme, n, k)
    x = torch.randn(rows, k)
    x = (x * torch.rand(k).pow(4) * 9).to(dtype)
    x = x.t().contiguous().t() if data.draw(st.booleans(), "strided") else x
    bias = data.draw(st.sampled_from((None, *DTYPES)), "bias")
    bias = None if bias is None else torch.randn(n).to(bias)
    with native.from_size(0):
        y = native.linear(x, planes, scheme, n, bias)
    assert y is not None, "not covered"
    assert y.shape == (rows, n)
    check(y, x, planes, scheme, n, bias)


@pytest.mark.parametrize(
    ("spelling", "k"),
    [
        *(("int4-g128+int8", 768), ("int4-g128-asym+int8", 640), ("int4-g64+int8", 704), ("int4-g32-asym+int8", 416)),
        *(("int4-row+int8", 1023), ("int4-row-asym+int8-g32", 480), ("int4-g256+int8-g64", 768), ("int4-g64+int8", 64)),
        *(("int8-row+int8", 768), ("int8-g64-asym+int8-g64", 768), ("int8-g128+int8", 768)),
    ],
)
def test_a_row_depends_on_nothing_else(spelling: str, k: int) -> None:
    """Whether codes are decoded in registers, for one row or for up to 8, or in panels, to the last bit of float32."""
    scheme, n = Scheme.parse(spelling), 75
    planes, x = planes_of(scheme, n, k), torch.randn(200, k)
    found = []
    for rows in (1, 2, 3, 4, 5, 8, 9, 40, 200):
        with native.from_size(0):
            y = native.linear(x[:rows], planes, scheme, n, None)
        assert y is not None
        found.append(y)
    for y in found:
        assert torch.equal(y, found[-1][: len(y)])


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("k", [1 << 16, (1 << 16) + 128])
@pytest.mark.parametrize(("scale", "value"), [(1.0, 1.0), (1e-6, 1e36)])
def test_the_largest_sums(k: int, code: int, scale: float, value: float) -> None:
    """Of rows under one scale, which are added up in 32 bits where these hold any sum; they meet the weight's first."""
    scheme, n = Scheme.parse("int8-row+int8"), 3
    planes = {"codes": torch.full((n, k), code, dtype=torch.int8), "scales": torch.full((n, 1), scale)}
    for rows in (1, 7, 9):
        x = torch.full((rows, k), value)
        with native.from_size(0):
            y = native.linear(x, planes, scheme, n, None)
        assert y is not None
        check(y, x, planes, scheme, n, None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("spelling", ["int4-g128+int8", "int8-row+int8"])
def test_a_weight_that_several_spans_of_rows_make_up(spelling: str) -> None:
    scheme, n, k = Scheme.parse(spelling), 1221, 4096
    planes = planes_of(scheme, n, k)
    for rows in (1, 3, 6):
        x, found = torch.randn(rows, k), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with native.from_size(0):
                y = native.linear(x, planes, scheme, n, None)
            assert y is not None
            found.append(y)
        check(found[0], x, planes, scheme, n, None)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("spelling", ["int4-g128+int8", "int8-row+int8-static", "int4-g128-asym+int8-g64"])
def test_codes_that_are_there_give_the_same_bits(spelling: str) -> None:
    scheme, n, k = Scheme.parse(spelling), 70, 384
    planes, x = planes_of(scheme, n, k), torch.randn(3, 2, k).bfloat16()
    assert scheme.activation is not None
    codes, scales = quantize_activation(x, scheme.activation, planes.get("input_scale"))
    bias = torch.randn(n)
    with native.from_size(0):
        there = native.linear_on_codes(codes, scales, planes, scheme, n, bias, x.dtype)
        made = native.linear(x, planes, scheme, n, bias)
    assert there is not None
    assert made is not None
    assert torch.equal(there, made)
    listed = list(planes.values())
    with native.from_size(0):
        whole = torch.ops.fxquant.linear(x, listed, [bias], spelling, [n], ABI)
        step = torch.ops.fxquant.linear_on_codes(x, codes, scales, listed, [bias], spelling, [n], ABI)
    assert torch.equal(whole, made)
    assert torch.equal(step, made)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    "spelling", ["int4-g128+int8", "int8-row+int8", "uint4-g128+int8", "int8-g32+int8", "int4+int8"]
)
def test_products_with_zeros_leave_nothing(spelling: str, rows: int) -> None:
    scheme, n, k = Scheme.parse(spelling), 9, 1024
    weight, x = torch.zeros(n, k), torch.randn(rows, k)
    weight[:, ::16], x[:, ::16] = 1.0, 0.0
    with native.from_size(0):
        y = native.linear(x, codecs.quantize(weight, scheme), scheme, n, None)
    assert y is not None
    assert not y.any()


@pytest.mark.parametrize("spelling", ["int4-g64+int8", "int4-g64+int8-g64", "int8-row+int8-static"])
def test_codes_lie_anywhere_and_may_be_of_one_token(spelling: str) -> None:
    scheme, n, k = Scheme.parse(spelling), 70, 256
    planes, x = planes_of(scheme, n, k), torch.randn(8, k)
    assert scheme.activation is not None
    codes, scales = quantize_activation(x, scheme.activation, planes.get("input_scale"))
    with native.from_size(0):
        whole = native.linear_on_codes(codes, scales, planes, scheme, n, None, x.dtype)
        assert whole is not None
        apart = codes.t().contiguous().t(), scales if scales.dim() == 1 else scales.t().contiguous().t()
        assert_equal(native.linear_on_codes(*apart, planes, scheme, n, None, x.dtype), whole)
        one, of_one = quantize_activation(x[3], scheme.activation, planes.get("input_scale"))
        alone = native.linear_on_codes(one, of_one, planes, scheme, n, None, x.dtype)
        assert_equal(alone, native.linear(x[3], planes, scheme, n, None))
        assert_equal(alone, native.linear(x[3:4], planes, scheme, n, None), (n,))
    large = planes_of(scheme, 512, k)
    assert native.linear_on_codes(one, of_one, large, scheme, 512, None, x.dtype) is not None, "the weight is large"


def assert_equal(found: Tensor | None, wanted: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
    assert found is not None
    assert wanted is not None
    assert torch.equal(found, wanted.view(shape or wanted.shape))


def test_a_layer_of_experts_with_static_scales_is_left_to_plain_torch() -> None:
    scheme, count, inner, k = Scheme.parse("int4-g64+int8-static"), 2, 64, 128
    first = {name: torch.stack([p] * count) for name, p in planes_of(scheme, 2 * inner, k).items()}
    second = {name: torch.stack([p] * count) for name, p in planes_of(scheme, k, inner).items()}
    x, ids, weights = torch.randn(2, k), torch.zeros(2, 1, dtype=torch.int64), torch.rand(2, 1)
    with native.from_size(0):
        assert native.gated_experts(x, ids, weights, (first, scheme), (second, scheme), inner, count) is None


@pytest.mark.parametrize("scale", [2.0**-119, 3e-5, 1.0, 7e4, 2.0**119])
def test_codes_of_floats_next_to_the_middle_of_two(scale: float) -> None:
    """Of quotients that are next to a half, to the last bit: with the weight one, y is what codes stand for."""
    scheme, k = Scheme.parse("int8-row+int8"), 256
    planes = {"codes": torch.eye(k, dtype=torch.int8), "scales": torch.ones(k, 1)}
    x = torch.arange(-127.0, 127.0).add(0.5).mul(1.2345 * scale).repeat(9, 1)
    for row in range(9):  # from four floats below to four above
        for _ in range(abs(row - 4)):
            x[row] = x[row].nextafter(torch.tensor(math.inf if row > 4 else -math.inf))
    x = torch.cat((x, torch.full((9, 2), 127 * 1.2345 * scale)), 1)
    assert scheme.activation is not None
    values = dequantize_activation(*quantize_activation(x, scheme.activation), scheme.activation)
    for rows in (1, 9):
        with native.from_size(0):
            y = native.linear(x[-rows:], planes, scheme, k, None)
        assert y is not None
        assert torch.equal(y, values[-rows:])


@pytest.mark.parametrize("spelling", ["int4-g128+int8", "int8-row+int8", "int3-g64+int8"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_its_row_alone(spelling: str, value: float) -> None:
    scheme, n, k = Scheme.parse(spelling), 20, 256
    planes = planes_of(scheme, n, k)
    for rows in (2, 9):
        x = torch.randn(rows, k)
        with native.from_size(0):
            before = native.linear(x, planes, scheme, n, None)
            x[1, 77] = value
            y = native.linear(x, planes, scheme, n, None)
        assert y is not None
        assert before is not None
        assert y[1].isnan().all()
        assert torch.equal(y[0], before[0])


@pytest.mark.parametrize("spelling", ["int4-g128+int8", "int4-g32-asym+int8", "int8-row+int8"])
@pytest.mark.usefixtures("threads")
def test_experts_and_threads(spelling: str) -> None:
    scheme, n, k, count = Scheme.parse(spelling), 150, 256, 3
    stacks = [planes_of(scheme, n, k + 0) for _ in range(count)]
    for e, stack in enumerate(stacks):
        stack["codes"] = stack["codes"].roll(e + 1, 0)
    planes = {name: torch.stack([stack[name] for stack in stacks]) for name in stacks[0]}
    x, ids = torch.randn(40, k), torch.randint(-1, count + 1, (40, 2))
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        with native.from_size(0):
            found.append(native.experts(x, ids, planes, scheme, n, None))
    y = found[0]
    assert y is not None
    assert found[1] is not None
    assert torch.equal(y, found[1])
    for slot in range(2):
        for e in range(count):
            at = ids[:, slot] == e
            check(y[at, slot], x[at], stacks[e], scheme, n, None)
    assert not y[(ids < 0) | (ids >= count)].any()
