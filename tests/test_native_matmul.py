"""The compiled product against float64, on awkward shapes, with outputs that hold nan before."""

from __future__ import annotations

import ctypes
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_planes import random_planes
from torch import Tensor

from fxquant import codecs, native
from fxquant.errors import SchemeError
from fxquant.inductor import has_bfloat16_products
from fxquant.native import library, matmul
from fxquant.ops import ABI
from fxquant.scheme import Scheme

# By element, zero, block and scale; K is a multiple of the number.
COVERED = {
    "int4-g256": 256, "nf4-g384-fp16": 384,
    "int4-g128": 128, "int4-g16": 16, "int4-g48-fp16": 48, "int4-row": 1, "int4-tensor": 1, "int4-b8x32": 16,
    "int4-row-asym": 1, "uint4-row-fzero": 1, "uint4-tensor-bias": 1, "uint3-row-bias": 1, "int8-row-asym": 1,
    "int4-g64-asym": 64, "uint4-g32": 32, "uint4-g64-fzero-fp16": 64, "uint4-g32-bias": 32, "int4-g32-e8m0": 32,
    "int4-flat64": 64, "uint4-flat64": 128, "int4-g64-perm": 64, "int4-g64-colscale": 64, "int3-g32": 32,
    "uint3-row": 1,
    "uint3-g16-fzero": 16, "int2-g16": 16, "uint2-g32-bias": 32, "ternary-tensor": 1, "ternary-g64": 64,
    "int5-g32": 32, "uint5-row": 1, "int5-g64-asym": 64, "uint5-g32-bias-fp16": 32, "int6-g16": 16, "uint6-row": 1,
    "int8-row": 1, "int8-g32-asym": 32, "uint8-g32": 32, "uint8-g16-fzero": 16, "int8-bias": 1, "nf4": 64,
    "nf4-g32": 32, "fp4": 64, "iq4": 32, "e2m1-row": 1, "table(-1,1)-g16": 16, "table(-2,1)-row": 1,
    "table(-1,0,1,2)-g64-fp16": 64, "table(-7,-3,-2,-1,0,1,2,5)-g16": 16, "mxfp4": 32, "mxfp6": 32, "mxfp6e3m2": 32,
    "mxfp8": 32, "fp8": 1, "fp8-b128x128": 1, "fp8e5m2-tensor": 1, "fp8-g64-fp16": 64, "nvfp4": 16,
    "nf4-dq": 64, "fp4-dq": 64, "q2_k": 256, "q3_k": 256, "q4_k": 256, "q5_k": 256, "q6_k": 256, "iq4_xs": 256,
    "q4_0": 32, "q8_0": 32, "e2m1-g16-e4m3": 16, "uint4-g32-bias-u4*bf16.g128": 128, "int6-g16-i8*fp32": 16,
}  # fmt: skip
NOT_COVERED = (
    "int4-g8",
    "int4-g24",
    "int4-flat100",
    "trit-g10",
    "vq8.8x8-fp16",
    "nf4-g64-colbias",
    "nf4+int8",
    "int8-row+int8-outlier6",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("compiled_products")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out shows."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **how: empty(self, *size, **how).fill_(math.nan))


def product(x: Tensor, planes: dict[str, Tensor], scheme: Scheme, n: int, bias: Tensor | None) -> Tensor:
    """By the compiled kernels, also with so many rows that a processor may be faster without them."""
    with pytest.MonkeyPatch.context() as patch, native.from_size(0):
        if built := matmul.library():
            patch.setattr(built, "fxquant_most_rows", lambda dtype: max(1024, x.numel()))
        y = native.linear(x, planes, scheme, n, bias)
    assert y is not None, "not covered"
    return y


def decoded(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    with native.from_size(math.inf):
        return codecs.dequantize(planes, scheme, n, k).double()


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the bound of `fxquant::linear`; where |x| @ |W| is beyond the dtype, anything."""
    assert y.dtype == x.dtype
    reference, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        reference, magnitude = reference + bias.double(), magnitude + bias.double().abs()
    info = torch.finfo(x.dtype)
    bound = (2 * info.eps + x.shape[-1] * 2.0**-24) * magnitude + info.smallest_normal
    assert ((y.double() - reference).abs() <= bound)[magnitude < info.max].all()


@pytest.mark.parametrize("spelling", COVERED)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_product_is_that_of_the_decoded_weight(spelling: str, data: st.DataObject) -> None:
    scheme, unit = Scheme.parse(spelling), COVERED[spelling]
    n = data.draw(st.integers(1, 40), "rows of the weight")
    k = unit * data.draw(st.integers(1, max(300 // unit, 3)), "units")
    rows = data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 50, 70, 140, 200)), "rows of x")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    planes = random_planes(scheme, n, k, seed=k)
    x = torch.randn(rows, 2 * k)[:, ::2].to(dtype)
    if data.draw(st.booleans(), "strided"):
        x = torch.cat((x, x), 1)[:, :k] if data.draw(st.booleans(), "rows apart") else x.t().contiguous().t()
    bias = data.draw(st.sampled_from((None, *DTYPES)), "bias")
    bias = None if bias is None else torch.randn(n).to(bias)
    y = product(x, planes, scheme, n, bias)
    assert y.shape == (rows, n)
    check(y, x, decoded(planes, scheme, n, k), bias)


ELEMENTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 5, 6, 8)]
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
BLOCKS = [*["row"] * 4, "tensor", "flat64", "b8x32", *(f"g{columns}" for columns in WIDTHS)]
"""Rows often: their columns end anywhere within what kernels read at once."""


@settings(max_examples=300, deadline=None)
@given(
    element=st.sampled_from(ELEMENTS + ["int4", "uint4"] * 3),
    block=st.sampled_from(BLOCKS),
    zero=st.sampled_from(("", "-asym", "-fzero", "-bias")),
    scales=st.sampled_from(("", "-fp16", "-bf16", "-e8m0")),
    n=st.sampled_from((1, 8, 33, 70)),
    k=st.integers(1, 600),
    rows=st.sampled_from((1, 2, 3, 4, 5, 8, 9, 17, 40)),
    dtype=st.sampled_from(DTYPES),
)
def test_integers_however_they_are_combined(
    element: str, block: str, zero: str, scales: str, n: int, k: int, rows: int, dtype: torch.dtype
) -> None:
    try:
        scheme = Scheme.parse(f"{element}-{block}{zero}{scales}")
        unit = 64 if block == "flat64" else 32 if block == "b8x32" else max(scheme.block.columns, 1)
        k, n = -(-k // unit) * unit, n if block != "b8x32" else -(-n // 8) * 8
        planes = random_planes(scheme, n, k, seed=k)
    except SchemeError:
        assume(False)
    x = torch.randn(rows, k).to(dtype)
    with native.from_size(0):
        y = native.linear(x, planes, scheme, n, None)
    assume(y is not None)
    assert y is not None
    check(y, x, decoded(planes, scheme, n, k), None)


@pytest.mark.parametrize("k", [100, 129, 300, 1000])
@pytest.mark.parametrize("spelling", ["int4-row-asym", "uint4-row-fzero", "uint4-tensor-bias", "int8-row-asym"])
def test_rows_with_one_zero_whatever_their_width(spelling: str, k: int) -> None:
    scheme = Scheme.parse(spelling)
    planes = random_planes(scheme, 40, k, seed=k)
    for dtype in DTYPES:
        for rows in (1, 2, 3, 9):
            x = torch.randn(rows, k).to(dtype)
            check(product(x, planes, scheme, 40, None), x, decoded(planes, scheme, 40, k), None)


@pytest.mark.parametrize("spelling", NOT_COVERED)
def test_what_is_not_covered_is_left_to_plain_torch(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    planes = random_planes(scheme, 8, 240)
    with native.from_size(0):
        assert native.linear(torch.randn(2, 240), planes, scheme, 8, None) is None


def limit_rows(patch: pytest.MonkeyPatch, rows: int) -> ctypes.CDLL:
    """The library, which asks for no more rows of x, whatever the processor."""
    built = matmul.library()
    assert built is not None
    patch.setattr(built, "fxquant_most_rows", lambda dtype: rows)
    return built


def test_tensors_that_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(monkeypatch, 64)
    scheme, x = Scheme.parse("int4-g16"), torch.randn(2, 64)
    planes = random_planes(scheme, 8, 64)
    assert native.linear(x, planes, scheme, 8, None) is None, "small"
    with native.from_size(0):
        assert native.linear(x, planes, scheme, 8, None) is not None
        assert native.linear(x.double(), planes, scheme, 8, None) is None
        assert native.linear(x, {**planes, "scales": planes["scales"].half()}, scheme, 8, None) is None
        assert native.linear(x, {**planes, "codes": planes["codes"][:7]}, scheme, 8, None) is None
        assert native.linear(x, planes, scheme, 8, torch.randn(7)) is None
        assert native.linear(torch.randn(65, 64), planes, scheme, 8, None) is None, "many rows"
        assert native.linear(torch.randn(64, 64), planes, scheme, 8, None) is not None
        assert native.linear(x.to("meta"), planes, scheme, 8, None) is None


@pytest.mark.parametrize(
    "spelling", ["int4-g64", "uint4-g32-bias", "nf4-dq", "q4_k", "int4-g64-perm", "int4-g64-colscale"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_many_rows_of_a_short_dtype(
    spelling: str, dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded first where that is compiled too, but not rounded; left to torch where the processor has instructions."""
    built = limit_rows(monkeypatch, 149)
    scheme = Scheme.parse(spelling)
    planes, x = random_planes(scheme, 20, 256), torch.randn(3, 50, 256).to(dtype) / 64
    bias = torch.randn(20) if biased else None
    with native.from_size(0):
        y = native.linear(x, planes, scheme, 20, bias)
    if built.fxquant_multiplies(matmul.DTYPES[dtype]):
        assert y is None
    else:
        assert y is not None
        assert y.shape == (3, 50, 20)
        check(y, x, decoded(planes, scheme, 20, 256), bias)


def test_leading_dimensions_and_strided_planes() -> None:
    scheme, x = Scheme.parse("uint4-g16"), torch.randn(2, 3, 64)
    planes = random_planes(scheme, 12, 64)
    y = product(x, {name: plane[::2] for name, plane in planes.items()}, scheme, 6, None)
    assert y.shape == (2, 3, 6)
    assert torch.equal(y, product(x, planes, scheme, 12, None)[..., ::2])


FEW, MORE = (1, 2), (3, 4, 5, 7, 15, 16, 40, 200)
"""Rows of x, with as many of which a row of the result is the same, whichever kernel, but for products of bfloat16."""


def alike(scheme: Scheme, dtype: torch.dtype, calls: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`calls` by how their rows are multiplied, which is the same bits in each: few rows, and more."""
    built = matmul.library()
    assert built is not None
    bits, integers, short = scheme.spec.bits, scheme.spec.kind == "int", dtype == torch.bfloat16
    limits = [0, 1 << 40]
    if built.fxquant_has_matrix_units():
        limits[1:] = [{4: 8, 8: 12 if integers else 4}.get(bits, 4), 1 << 40]
        if bits == 4 and short:
            limits[1] = 4 if not integers else 6 if scheme.zero == "none" else 5
    elif built.fxquant_multiplies_pairs() and short:
        limits[1:] = [4, 24, 1 << 40] if bits == 8 and integers else [{2: 6, 3: 6, 4: 4}.get(bits, 8), 1 << 40]
    return [tuple(c for c in calls if least < c <= most) for least, most in pairwise(limits)]


@pytest.mark.parametrize(
    ("spelling", "dtype", "calls"),
    [
        ("int4-g128", torch.float32, (1, 3, 4, 5, 13, 15)),
        ("nf4-dq", torch.bfloat16, (1, 3, 4, 5, 13, 15)),
        ("q6_k", torch.bfloat16, (1, 3, 4, 5, 13, 15)),
        ("fp8", torch.bfloat16, (1, 3, 4, 5, 13, 15)),
        *[(name, torch.bfloat16, FEW) for name in ("int4-g128", "int4-g32-asym")],
        ("int8", torch.bfloat16, (1, 2, 3, 4)),
        ("int5-g64", torch.bfloat16, (5, 7, 8, 9, 16)),
        ("nf4", torch.bfloat16, (5, 8, 9, 32)),
        *[(name, torch.float16, MORE) for name in ("int4-g128", "uint4-g32-bias", "int4-g64-asym")],
        ("int8-g96", torch.bfloat16, (5, 7, 16, 200)),
    ],
)
def test_a_row_depends_on_nothing_else(spelling: str, dtype: torch.dtype, calls: tuple[int, ...]) -> None:
    """To the last bit of float32, with a bias that takes what is left of an error out of the rounding of the result."""
    built = matmul.library()
    assert built is not None
    if max(calls) > 15 and not built.fxquant_multiplies_codes():
        pytest.skip("no AVX512-VNNI")
    scheme = Scheme.parse(spelling)
    planes, x = random_planes(scheme, 33, 768), torch.randn(max(calls), 768).to(dtype)
    for some in filter(None, alike(scheme, dtype, calls)):
        most = x[: max(some)]
        bias = -product(most, planes, scheme, 33, None)[0].float()
        whole = product(most, planes, scheme, 33, bias)
        assert (whole[0].abs() < 0.01 * bias.abs() + 1e-3).all()
        for rows in some:
            assert torch.equal(product(x[:rows], planes, scheme, 33, bias), whole[:rows])


@pytest.mark.parametrize(
    "spelling", ["int4-g64", "int4-g32-asym", "fp8", "int4-g128+int8", "int8-row+int8", "int6-g64+int8"]
)
def test_so_many_rows_that_they_are_multiplied_in_parts(spelling: str) -> None:
    """More than kernels take at once, and than caches hold, against the first rows and the last by themselves."""
    scheme, n, k, rows = Scheme.parse(spelling), 70, 4096, 1300
    planes, x = random_planes(scheme, n, k, seed=k), torch.randn(rows, k).bfloat16()
    y = product(x, planes, scheme, n, None)
    for some in (slice(0, 100), slice(700, 800), slice(1200, 1300)):
        assert torch.equal(y[some], product(x[some], planes, scheme, n, None))
    if scheme.activation is None:
        check(y, x, decoded(planes, scheme, n, k), None)


def test_products_of_bfloat16_are_those_that_the_cost_model_reckons_with(compiled_products: None) -> None:
    built = matmul.library()
    assert built is not None
    assert bool(built.fxquant_has_matrix_units() or built.fxquant_multiplies_pairs()) == has_bfloat16_products()


def is_rounded(scheme: Scheme, dtype: torch.dtype, rows: int) -> bool:
    """Whether weights are rounded with the scales of their blocks: by matrix units, or by pairs."""
    built, columns, bits = matmul.library(), scheme.block.columns or 0, scheme.spec.bits
    if built is None or dtype != torch.bfloat16 or rows <= 32 or columns == 0:
        return False
    if built.fxquant_has_matrix_units():
        return bits == 4 or (bits < 4 and columns % 32 == 0)
    if not built.fxquant_multiplies_pairs() or (bits == 8 and scheme.spec.kind == "int"):
        return False
    return columns % ((64 if scheme.zero == "none" else 128) // (1 if bits == 4 else 2)) != 0


INTEGERS = (
    *("int4-g128", "int4-g32", "int4-g64-asym", "uint4-g32-bias", "uint4-g64-fzero-fp16", "int4-g192"),
    *("int4-row", "int4-row-asym", "int8-row", "q4_k", "int6-g64", "int2-g64"),
    *("int8-g128", "int8-g32-asym", "uint8-g64-bias", "int8-g96", "int6-g32", "int5-g16-asym", "uint3-g32-bias"),
)


@pytest.mark.parametrize("spelling", INTEGERS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_floats_as_whole_numbers_are_off_by_less_than_their_promise(spelling: str, data: st.DataObject) -> None:
    """Against float64, by the rounding of sums and 2^-23 of the largest of 128.

    A bias that takes the rounded result away leaves what rounding would hide.
    """
    scheme = Scheme.parse(spelling)
    unit = max(scheme.block.columns, 1) if spelling != "q4_k" else 256
    n = data.draw(st.integers(1, 140), "rows of the weight")
    k = unit * data.draw(st.integers(1, max(600 // unit, 2)), "units")
    rows = data.draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 17, 70, 140, 200)), "rows of x")
    dtype = data.draw(st.sampled_from((torch.bfloat16, torch.float16)), "dtype")
    spread = data.draw(st.sampled_from((1, 4, 12)), "powers of e between columns")
    planes = random_planes(scheme, n, k, seed=k)
    x = (torch.randn(rows, k) * torch.exp(-spread * torch.rand(k))).to(dtype)
    weight, last = decoded(planes, scheme, n, k), x[-1].double()
    rounded = product(x, planes, scheme, n, None)[-1]
    rest = product(x, planes, scheme, n, -rounded.float())[-1].double()
    largest = torch.nn.functional.pad(last.abs(), (0, -k % 128)).unflatten(0, (-1, 128)).amax(-1)
    held = 2.0**-23 * (weight.abs() @ largest.repeat_interleave(128)[:k])
    # Three roundings for every 32 columns, of sums of codes and of x, which are apart where there is a zero.
    apart = weight.abs().amax(1, True)
    if scheme.zero == "int":  # codes and zeros are multiplied apart: both may be large where weights are 0
        apart = 2.0**scheme.spec.bits * planes["scales"].double().abs().amax(1, True)
    sums = 2.0**-24 * (3 * k / 32 + 8) * ((weight.abs() + 2 * apart) @ last.abs())
    if is_rounded(scheme, dtype, rows):
        held = held + 2.0**-8 * (weight.abs() @ last.abs())
    slack = torch.finfo(dtype).eps / 2 * rest.abs() + held + sums + torch.finfo(dtype).smallest_normal
    finite = rounded.isfinite()
    assert ((rounded.double() + rest - weight @ last).abs() <= slack)[finite].all()


@pytest.mark.parametrize("spelling", COVERED)
def test_products_of_bfloat16_round_values_no_more_than_they_say(spelling: str) -> None:
    """Behind the rounding of results: not at all, if values are bfloat16 or x is float32; else to 16 bits or to 8."""
    built = matmul.library()
    if built is None or not (built.fxquant_has_matrix_units() or built.fxquant_multiplies_pairs()):
        pytest.skip("no products of bfloat16")
    scheme, unit, n = Scheme.parse(spelling), COVERED[spelling], 70
    k = unit * -(-300 // unit)
    planes = random_planes(scheme, n, k, seed=k)
    weight, values = (
        decoded(planes, scheme, n, k),
        torch.tensor(scheme.spec.values if scheme.spec.kind == "table" else ()),
    )
    exact = torch.equal(values, values.bfloat16().float())
    for dtype in DTYPES:
        for rows in (1, 3, 9, 40, 80):
            x = torch.randn(rows, k).to(dtype)
            rounded = product(x, planes, scheme, n, None)[-1]
            rest = product(x, planes, scheme, n, -rounded.float())[-1].double()
            last = x[-1].double().abs()
            held = 0 if exact or dtype == torch.float32 else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-16
            if is_rounded(scheme, dtype, rows):  # values of other tables twice, but for those of 4 bits
                held = 2.0**-8 + (held if scheme.spec.bits != 4 else 0)
            sums = 2.0**-24 * (k / 4 + 8) * ((weight.abs() + 2 * weight.abs().amax(1, True)) @ last)
            info = torch.finfo(dtype)
            slack = info.eps / 2 * rest.abs() + held * (weight.abs() @ last) + sums + info.smallest_normal
            off = (rounded.double() + rest - weight @ x[-1].double()).abs()
            assert (off <= slack)[rounded.isfinite()].all(), (dtype, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float_of_a_few_powers_of_two_is_held_exactly(dtype: torch.dtype) -> None:
    """One by one, beside the largest that there can be: products with 1 have to give them back."""
    scheme, k = Scheme.parse("uint4-g128"), 128
    planes = codecs.quantize(torch.eye(k) * 15, scheme, "absmax")
    bits = 7 if dtype == torch.bfloat16 else 10
    patterns = torch.arange(1 << bits + 3, dtype=torch.int32)
    exponents = (patterns >> bits) * (2 if dtype == torch.bfloat16 else 1)
    values = (1 + (patterns & (1 << bits) - 1) / (1 << bits)) * 2.0 ** (-exponents.float())
    x = torch.cat((values, -values)).to(dtype).view(-1, k)
    x[:, 0] = 2 - torch.finfo(dtype).eps
    wanted = x.to(torch.float32).mul(15).to(dtype)
    assert torch.equal(product(x, planes, scheme, k, None), wanted)
    for row, y in zip(x, wanted, strict=True):
        assert torch.equal(product(row, planes, scheme, k, None), y)


@pytest.mark.parametrize("together", [1, 2, 6])
def test_floats_that_are_no_whole_numbers_go_another_way(together: int) -> None:
    """Infinity, NaN, and what is too large or too small for powers of two that are floats."""
    scheme = Scheme.parse("int4-g32")
    planes, x = random_planes(scheme, 40, 256), torch.randn(6, 256).bfloat16()
    weight = decoded(planes, scheme, 40, 256)
    for value in (1e32, 1e-32, 1e-40, 3e38):
        scaled = x.clone()
        scaled[2] *= value
        check(product(scaled[2 : 2 + together], planes, scheme, 40, None), scaled[2 : 2 + together], weight, None)
    x[0, 5], x[1, 7], x[4] = math.nan, math.inf, 0.0
    y = torch.cat([product(some, planes, scheme, 40, None) for some in x.split(together)])
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1], (x[1].double() @ weight.T).bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert y[1].isinf().any()
    check(y[2:], x[2:], weight, None)
    assert not y[4].any()


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing() -> None:
    for spelling in ("int4-g64", "uint3-g32", "nf4", "q4_k"):
        scheme, found = Scheme.parse(spelling), []
        planes = random_planes(scheme, 150, 768)
        ids, stacks = torch.randint(0, 2, (9, 2)), {name: torch.stack((p, p.flip(0))) for name, p in planes.items()}
        for count in (1, 3):
            torch.set_num_threads(count)
            with native.from_size(0):
                torch.manual_seed(0)
                y = native.experts(torch.randn(9, 768), ids, stacks, scheme, 150, None)
            found.append([y, product(torch.randn(3, 768), planes, scheme, 150, None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("spelling", ["int4-g128", "int4-g128-asym", "nf4", "nvfp4", "int8-row", "int3-g64"])
def test_a_weight_that_several_spans_of_rows_make_up(spelling: str) -> None:
    scheme, n, k = Scheme.parse(spelling), 1221, 4096
    planes, bias = random_planes(scheme, n, k), torch.randn(n)
    weight = decoded(planes, scheme, n, k)
    for rows in (1, 7, 20):
        x, found = torch.randn(rows, k), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(product(x, planes, scheme, n, bias))
        check(found[0], x, weight, bias)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("spelling", ["fp8", "fp8-g64-fp16", "fp8e5m2-tensor"])
def test_every_pattern_of_a_small_float(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    planes = random_planes(scheme, 256, 64)
    planes["codes"] = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 64).contiguous()
    y, weight = product(torch.eye(64)[:3], planes, scheme, 256, None), decoded(planes, scheme, 256, 64)
    expected = torch.eye(64)[:3].double() @ weight.T
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert y.isnan().any()


def test_what_is_not_finite_stays_so() -> None:
    scheme = Scheme.parse("int4-g16")
    planes, x = random_planes(scheme, 8, 64), torch.ones(3, 64)
    x[0, 5], x[1, 7] = math.nan, math.inf
    y = product(x, planes, scheme, 8, None)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()
    planes["scales"][3] = math.nan
    assert torch.equal(product(x, planes, scheme, 8, None)[2].isnan(), torch.arange(8) == 3)


def stacked(scheme: Scheme, experts: int, n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    each = [random_planes(scheme, n, k, seed) for seed in range(experts)]
    planes = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    return planes, torch.stack([decoded(p, scheme, n, k) for p in each])


@pytest.mark.parametrize("spelling", ["int4-g64", "nf4-dq", "q4_k", "uint4-g32", "nvfp4", "fp8-b128x128", "int8"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_experts(spelling: str, data: st.DataObject) -> None:
    scheme = Scheme.parse(spelling)
    count, n = data.draw(st.integers(1, 5), "experts"), data.draw(st.integers(1, 40), "n")
    tokens, picks = data.draw(st.sampled_from((0, 1, 2, 30)), "tokens"), data.draw(st.integers(1, 3), "picks")
    planes, weights = stacked(scheme, count, n, 256)
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    x = torch.randn(tokens, picks, 256).to(dtype)
    ids = torch.randint(-1, count + 1, (picks, tokens)).t()
    bias = torch.randn(count, n).to(dtype) if data.draw(st.booleans(), "bias") else None
    each = data.draw(st.booleans(), "a row for every id")
    with pytest.MonkeyPatch.context() as patch, native.from_size(0):
        limit_rows(patch, 1024)
        y = native.experts(x if each else x[:, 0], ids, planes, scheme, n, bias)
    assert y is not None
    assert y.shape == (tokens, picks, n)
    for t in range(tokens):
        for j in range(picks):
            e, row = int(ids[t, j]), x[t, j if each else 0].unsqueeze(0)
            if 0 <= e < count:
                check(y[t, j].unsqueeze(0), row, weights[e], None if bias is None else bias[e])
            else:
                assert not y[t, j].any()


def test_experts_that_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(monkeypatch, 1024)
    scheme = Scheme.parse("int4-g64")
    planes, _ = stacked(scheme, 3, 8, 128)
    x, ids = torch.randn(2, 128), torch.zeros(2, 2, dtype=torch.int64)
    with native.from_size(0):
        assert native.experts(x, ids, planes, scheme, 8, None) is not None
        assert native.experts(x, ids.int(), planes, scheme, 8, None) is None
        assert native.experts(x[:1], ids, planes, scheme, 8, None) is None
        assert native.experts(x, ids, planes, scheme, 8, torch.randn(2, 8)) is None
        assert native.experts(x, ids, {**planes, "codes": planes["codes"][:2]}, scheme, 8, None) is None
        many = torch.zeros(2000, 2, dtype=torch.int64)
        assert native.experts(torch.randn(2000, 128), many, planes, scheme, 8, None) is None, "many rows of one expert"
        many[:] = -1
        many[:3] = 1
        assert native.experts(torch.randn(2000, 128), many, planes, scheme, 8, None) is not None


def test_the_op_uses_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, x, bias = Scheme.parse("int4-g128"), torch.randn(3, 512), torch.randn(512)
    planes = random_planes(scheme, 512, 512)
    calls = list(planes.values()), [bias], str(scheme), [512], ABI
    y = torch.ops.fxquant.linear(x, *calls)
    check(y, x, decoded(planes, scheme, 512, 512), bias)
    monkeypatch.setattr("fxquant.ops.decode", None)
    assert torch.equal(torch.ops.fxquant.linear(x, *calls), y)


def test_without_a_compiler_there_is_one_warning_and_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(library, "compile_cpp", fails)
    matmul.library.cache_clear()
    scheme, x = Scheme.parse("int4-g128"), torch.randn(3, 512)
    planes = random_planes(scheme, 512, 512)
    try:
        with pytest.warns(UserWarning, match="could not be compiled: no g\\+\\+ here"):
            y = torch.ops.fxquant.linear(x, list(planes.values()), [], str(scheme), [512], ABI)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.linear(x, planes, scheme, 512, None) is None
    finally:
        matmul.library.cache_clear()
        library.library.cache_clear()  # which plain torch asked for
    check(y, x, decoded(planes, scheme, 512, 512), None)
