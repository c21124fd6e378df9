"""Planes against a plain float64 implementation of what they mean, and the properties that every scheme has."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.codecs import all_finite, decode, dequantize, encode, finite, quantize, squared_error, tables
from fxquant.codecs.double import dynamic_map
from fxquant.errors import SchemeError
from fxquant.scheme import DOUBLE_QUANT_BLOCK, ELEMENTS, SCALE_TYPES, Scheme

SPELLINGS = [
    "int8", "int8-tensor", "int8-g32", "int8-asym", "int8-b128x128-bf16", "int8-g16-fp16-asym",
    "int4", "int4-g32", "int4-row", "int4-tensor", "int4-b3x5", "int4-flat40", "int4-g64-asym", "int4-g16-fp16",
    "uint4-g32", "uint4-row", "uint4-b4x7", "uint4-flat33", "uint4-tensor",
    "nf4", "nf4-dq", "nf4-g64", "nf4-row", "nf4-b8x8", "nf4-flat32-dq", "nf4-flat100-bf16", "nf4-tensor-fp16",
    "fp4", "fp4-dq", "fp4-g32", "fp4-flat33-dq",
    "fp8", "fp8-tensor", "fp8-b128x128", "fp8-g16", "fp8-flat48-fp16", "fp8e5m2", "fp8e5m2-g32-fp32", "mxfp8",
    "int2-g16", "int3-g32", "int3-row", "int5-g32-fp16", "int5-flat40", "int6", "uint2-g16", "uint3-b3x5", "uint5-row",
    "uint6-g64", "uint8", "uint8-g32-fp16", "int6-g32-e8m0", "int4-g32-e8m0",
    "ternary", "ternary-g32", "trit-g32", "trit-row", "bitnet", "trit-g128-fp16",
    "e2m1", "mxfp4", "mxfp6", "mxfp6e3m2", "iq4_nl", "iq4-row", "table(-1,-0.3,0.3,1)", "table(-1,1)-g32",
    "table(-3,-1,0,0.001,0.0011,1,2,5)-g16", "int4-b8x0",
]  # fmt: skip
SEARCHES = ("absmax", "least_squares")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
spellings = st.sampled_from(SPELLINGS)
searches = st.sampled_from(SEARCHES)
seeds = st.integers(0, 2**31)


@st.composite
def weights(draw: st.DrawFn, scheme: Scheme) -> Tensor:
    """Small weights of any shape that the scheme holds; some with zeros, equal rows or outliers, some strided."""
    n, k = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    if scheme.misfit(n, k):
        k = k // 20 * scheme.block.columns
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(n, k, generator=generator) * draw(st.sampled_from([1e-5, 1.0, 30.0]))
    special = draw(st.sampled_from(["none", "zero", "constant", "outlier", "positive"]))
    if n * k:
        match special:
            case "zero":
                weight[:: draw(st.integers(1, 3))] = 0
            case "constant":
                weight[::2] = weight[0, 0]
            case "outlier":
                weight.view(-1)[::41] *= 50
            case "positive":
                weight.abs_()
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    return weight.t().contiguous().t() if draw(st.booleans()) else weight


cases = spellings.flatmap(lambda spelling: st.tuples(st.just(spelling), weights(Scheme.parse(spelling)), searches))


def bits_of(packed: Tensor, bits: int, n: int) -> Tensor:
    """The fields of packed rows, bit by bit."""
    stream = ((packed.unsqueeze(-1).int() >> torch.arange(8)) & 1).flatten(-2)[..., : n * bits]
    return (stream.unflatten(-1, (n, bits)) << torch.arange(bits)).sum(-1)


def block_of(scheme: Scheme, n: int, k: int) -> Tensor:
    """The number of the block that each weight belongs to, counting along the rows of the grid."""
    i, j = torch.arange(n).unsqueeze(1), torch.arange(k).unsqueeze(0)
    if scheme.block.flat:
        return (i * k + j) // scheme.block.columns
    rows, columns = scheme.block.rows or n, scheme.block.columns or k
    return i // rows * math.ceil(k / columns) + j // columns


def fields_of(plane: Tensor, scheme: Scheme, k: int) -> Tensor:
    """What is packed into a plane of codes or zeros, one each."""
    if not scheme.spec.trits:
        return bits_of(plane, scheme.spec.bits, k)
    return torch.stack([plane.long() // 3**i % 3 for i in range(5)], -1).flatten(-2)[..., :k]


def integers_of(plane: Tensor, scheme: Scheme, n: int, k: int) -> Tensor:
    element = scheme.spec
    return plane.long() if element.dtype is not None else fields_of(plane, scheme, k) + element.low


def scales_of(planes: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The scales of all blocks, float64."""
    if SCALE_TYPES[scheme.scale].kind == "power":
        return 2.0 ** (planes["scales"].double().flatten() - 127)
    if not scheme.double:
        return planes["scales"].double().flatten()
    second = planes["scale_scales"].repeat_interleave(DOUBLE_QUANT_BLOCK)[: planes["scales"].numel()]
    product = (dynamic_map()[planes["scales"].long()].double() * second).float()
    return (product.double() + planes["scale_offset"]).float().double()


def values_of(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """What the codes stand for before the scale, float64."""
    match scheme.spec.kind:
        case "table":
            return torch.tensor(scheme.spec.values).double()[fields_of(planes["codes"], scheme, k)]
        case "float":
            return planes["codes"].view(scheme.spec.float_dtype).double()
    values = integers_of(planes["codes"], scheme, n, k).double()
    if scheme.zero == "none":
        return values
    zeros = integers_of(planes["zeros"], scheme, *_two(scheme.block.grid(n, k)))
    return values - zeros.flatten()[block_of(scheme, n, k)]


def _two(grid: tuple[int, ...]) -> tuple[int, int]:
    return (1, *grid)[-2:]


def reference(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """The weight that planes hold, computed in float64 from the definitions alone."""
    if not n * k:
        return torch.zeros(n, k, dtype=torch.float64)
    return values_of(planes, scheme, n, k) * scales_of(planes, scheme)[block_of(scheme, n, k)]


def levels(scheme: Scheme) -> Tensor:
    """All values that a code can stand for."""
    match scheme.spec.kind:
        case "table":
            return torch.tensor(scheme.spec.values).double()
        case "float":
            values = torch.arange(256, dtype=torch.uint8).view(scheme.spec.float_dtype).double()
            return values[values.isfinite()]
    return torch.arange(scheme.spec.low, scheme.spec.high + 1).double()


def block_errors(weight: Tensor, planes: dict[str, Tensor], scheme: Scheme) -> Tensor:
    n, k = weight.shape
    squares = (weight.double() - reference(planes, scheme, n, k)).square().flatten()
    return (
        torch.zeros(math.prod(scheme.block.grid(n, k)))
        .double()
        .index_add_(0, block_of(scheme, n, k).flatten(), squares)
    )


def in_pieces(patch: pytest.MonkeyPatch, size: int) -> None:
    """Work on so many weights at a time."""
    for module in (encode, decode, finite):
        patch.setattr(module, "budget", lambda device: size)


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=200)
@given(cases)
def test_planes_are_what_the_scheme_predicts(case):
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    n, k = weight.shape
    planes, specs = quantize(weight, scheme, search), scheme.planes(n, k)
    assert list(planes) == list(specs)
    for name, plane in planes.items():
        assert (tuple(plane.shape), plane.dtype) == (specs[name].shape, specs[name].dtype)
        assert plane.is_contiguous()
    assert sum(plane.nbytes for plane in planes.values()) == scheme.nbytes(n, k)


@settings(deadline=None, max_examples=300)
@given(cases)
def test_dequantize_is_the_definition(case):
    """Bit for bit: in float64 the product of two float32 numbers is exact, so that it is rounded once either way."""
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    n, k = weight.shape
    planes = quantize(weight, scheme, search)
    result = dequantize(planes, scheme, n, k)
    assert result.dtype == torch.float32
    assert torch.equal(result.double(), reference(planes, scheme, n, k).float().double())


@settings(deadline=None, max_examples=200)
@given(cases)
def test_every_code_is_the_nearest_one(case):
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    n, k = weight.shape
    planes = quantize(weight, scheme, search)
    if not n * k or (scheme.double and search == "absmax"):  # bitsandbytes' rule looks at the scales before rounding
        return
    scale = scales_of(planes, scheme)[block_of(scheme, n, k)]
    steps = levels(scheme)
    if scheme.zero == "int":
        zeros = integers_of(planes["zeros"], scheme, *_two(scheme.block.grid(n, k))).flatten()
        steps = steps - zeros[block_of(scheme, n, k)].unsqueeze(-1)
    w = weight.double()
    best = (w.unsqueeze(-1) - steps * scale.unsqueeze(-1)).abs().amin(-1)
    error = (w - reference(planes, scheme, n, k)).abs()
    assert (error <= best + 1e-5 * scale.abs() + 1e-6 * w.abs()).all()


@settings(deadline=None, max_examples=200)
@given(cases)
def test_zero_stays_zero(case):
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    if (levels(scheme) == 0).any():
        planes = quantize(weight, scheme, search)
        assert (dequantize(planes, scheme, *weight.shape)[weight == 0] == 0).all()


@settings(deadline=None, max_examples=300)
@given(spellings.flatmap(lambda spelling: st.tuples(st.just(spelling), weights(Scheme.parse(spelling)))))
def test_least_squares_is_never_worse_than_absmax(case):
    """In any block. The search compares errors in float32, hence the tolerance."""
    spelling, weight = case
    scheme = Scheme.parse(spelling)
    if not weight.numel():
        return
    searched, spanning = (
        block_errors(weight, quantize(weight, scheme, s), scheme) for s in ("least_squares", "absmax")
    )
    norm = torch.zeros_like(searched).index_add_(
        0, block_of(scheme, *weight.shape).flatten(), weight.double().square().flatten()
    )
    assert (searched <= spanning * (1 + 1e-4) + norm * 1e-10).all()


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s[:3] == "int" and "asym" not in s and "16" not in s])
def test_absmax_clips_no_integer(spelling):
    scheme = replace(Scheme.parse(spelling), scale="fp32")
    weight = gaussian(64, 384) + 0.3
    planes = quantize(weight, scheme, "absmax")
    step = scales_of(planes, scheme)[block_of(scheme, 64, 384)]
    assert ((weight - dequantize(planes, scheme, 64, 384)).abs() <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize(
    ("spelling", "percent"),
    [
        ("int4-g128", 0.94), ("int4-g64", 0.81), ("int4-g32", 0.66), ("int4-g64-asym", 0.77), ("uint4-g64", 0.77),
        ("nf4-g64", 0.73), ("nf4", 0.73), ("nf4-dq", 0.73), ("fp4", 1.28), ("int8-g128", 0.0040), ("fp8-g128", 0.057),
        ("int4-tensor", 1.20), ("int4-row", 1.19),
    ],
)  # fmt: skip
def test_error_on_normal_weights(spelling, percent):
    """A million samples; the first six are what a search over 30 scales of either sign reaches with fp16 scales."""
    weight, scheme = gaussian(256, 4096), Scheme.parse(spelling)
    assert squared_error(weight, quantize(weight, scheme), scheme) * 100 <= percent


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "worse_to_better",
    [
        ["int4-row", "int4-g128", "int4-g64", "int4-g32"],
        ["int4-g64", "int4-g64-asym", "int8-g64"],
        ["fp4", "nf4", "fp8-flat64", "int8-flat64"],
        ["int4-tensor", "int4-b64x128", "int4-b1x128"],
        ["nf4-row", "nf4-flat256", "nf4-flat64"],
    ],
)
def test_more_bits_and_smaller_blocks_are_better(search, worse_to_better):
    weight = gaussian(128, 2048, seed=1)
    errors = [squared_error(weight, quantize(weight, s, search), s) for s in map(Scheme.parse, worse_to_better)]
    assert errors == sorted(errors, reverse=True)


def test_heavy_tails_of_large_blocks_are_clipped():
    """One scale for many weights must not follow the largest one."""
    tails = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    weight, scheme = tails.sample((512, 512)), Scheme.parse("int4-tensor")
    errors = [squared_error(weight, quantize(weight, scheme, s), scheme) for s in ("absmax", "least_squares")]
    assert errors[0] > 0.6
    assert errors[1] < 0.2


def test_zero_points_are_searched_too():
    """With the zero point of absmax and the best scale the error is 0.248 %, with both of absmax 0.318 %."""
    weight, scheme = gaussian(256, 1024) + 2, Scheme.parse("uint4-row")
    assert squared_error(weight, quantize(weight, scheme), scheme) * 100 <= 0.24


def test_negative_scales_serve_the_larger_tail():
    """-8 is a code and 8 is not: a block with one large positive weight wants the other sign."""
    weight = torch.full((2, 32), 0.125)
    weight[0, 3], weight[1, 3] = 1.0, -1.0
    scheme = Scheme.parse("int4-g32")
    planes = quantize(weight, scheme)
    assert torch.equal(dequantize(planes, scheme, 2, 32), weight)
    assert planes["scales"].flatten().tolist() == [-0.125, 0.125]


@settings(deadline=None, max_examples=100)
@given(spellings, searches, seeds, st.integers(-20, 20))
def test_powers_of_two_move_into_the_scales(spelling, search, seed, power):
    scheme = Scheme.parse(spelling)
    if scheme.scale == "fp16":
        power = power // 10  # more would leave the range
    weight = gaussian(6, 384, seed)
    planes, scaled = quantize(weight, scheme, search), quantize(weight * 2.0**power, scheme, search)
    assert torch.equal(planes["codes"].view(torch.uint8), scaled["codes"].view(torch.uint8))
    assert torch.equal(scales_of(planes, scheme) * 2.0**power, scales_of(scaled, scheme))


@settings(deadline=None, max_examples=60)
@given(cases, st.sampled_from([8, 50, 1000]))
def test_results_do_not_depend_on_the_size_of_pieces(case, size):
    spelling, weight, _ = case
    scheme = Scheme.parse(spelling)
    whole = {search: quantize(weight, scheme, search) for search in SEARCHES}
    with pytest.MonkeyPatch.context() as patch:
        in_pieces(patch, size)
        for name, plane in quantize(weight, scheme, "absmax").items():
            assert torch.equal(plane.view(torch.uint8), whole["absmax"][name].view(torch.uint8))
        planes = quantize(weight, scheme)
        error = squared_error(weight, planes, scheme)
        n, k = weight.shape
        pieces = dequantize(planes, scheme, n, k)
    # Sums over a block are rounded differently in pieces, which may decide between scales that were equally good before
    # they were rounded.
    assert error == pytest.approx(squared_error(weight, whole["least_squares"], scheme), rel=0.02, abs=2.0**-18)
    assert torch.equal(pieces, dequantize(planes, scheme, n, k))


@pytest.mark.parametrize("name", [name for name, element in ELEMENTS.items() if element.kind == "table"])
def test_no_bin_of_a_table_holds_two_bounds(name):
    """What makes one comparison enough; a table with closer values needs more bins, or is slower."""
    assert tables.Tables(ELEMENTS[name], torch.device("cpu"))._binned


class LargestResult(TorchDispatchMode):
    """The most elements that any tensor had which an operation made, views not counted."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spelling", ["int4-g32", "int8", "int4-tensor", "uint4-b32x32", "nf4-flat96", "nf4-dq", "fp8"])
@pytest.mark.parametrize("layout", ["rows", "columns", "one row"])
def test_memory_is_bounded(monkeypatch, spelling, search, layout):
    size, scheme = 2048, Scheme.parse(spelling)
    in_pieces(monkeypatch, size)
    weight = gaussian(256, 512).bfloat16()
    if layout == "columns":
        weight = gaussian(512, 256).bfloat16().t()
    elif layout == "one row":
        weight = weight.view(1, -1)
    planes = quantize(weight, scheme, search)
    largest = LargestResult(weight, *planes.values())
    with largest:
        quantize(weight, scheme, search, out=planes)
        squared_error(weight, planes, scheme)
        all_finite(weight)
    blocks = math.prod(scheme.block.grid(*weight.shape))
    lookup = 1 << 16 if scheme.double else 4096
    assert largest.largest <= max(4 * size, blocks * 2, lookup)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes_stay_finite(spelling, dtype):
    scheme, limit = Scheme.parse(spelling), torch.finfo(dtype).max
    for magnitude in (5e-324, 1e-45, 1e-40, 1e-30, 1e30, 3e38, 1e300):
        weight = (gaussian(9, 384).clamp(-1, 1).double() * magnitude).clamp(-limit, limit).to(dtype)
        assert all_finite(weight)
        for search in SEARCHES:
            planes = quantize(weight, scheme, search)
            assert all(plane.float().isfinite().all() for plane in planes.values())
            assert dequantize(planes, scheme, 9, 384).isfinite().all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if Scheme.parse(s).scale in ("fp32", "bf16")])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_large_and_small_weights_are_as_good_as_others(spelling, magnitude, search):
    scheme, weight = Scheme.parse(spelling), gaussian(9, 384)
    usual, extreme = (squared_error(w, quantize(w, scheme, search), scheme) for w in (weight, weight * magnitude))
    assert extreme == pytest.approx(usual, rel=0.02)


def test_subnormal_bfloat16_weights():
    weight = torch.arange(-60, 68, dtype=torch.int16).view(1, 128).abs().view(torch.bfloat16)
    assert (weight.float().abs() < torch.finfo(torch.bfloat16).smallest_normal).all()
    for spelling in ("int4", "nf4", "fp8", "nf4-dq"):
        scheme = Scheme.parse(spelling)
        for search in SEARCHES:
            assert squared_error(weight, quantize(weight, scheme, search), scheme) <= 1


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if Scheme.parse(s).scale != "e8m0"])
@pytest.mark.parametrize("value", [0.37, -0.37])
def test_equal_weights_are_kept(spelling, search, value):
    """To the precision of the scale."""
    scheme, weight = Scheme.parse(spelling), torch.full((4, 384), value)
    planes = quantize(weight, scheme, search)
    precision = {"fp32": 2.0**-22, "bf16": 2.0**-8, "fp16": 2.0**-10}[scheme.scale]
    assert dequantize(planes, scheme, 4, 384).sub(value).abs().max() <= precision * abs(value)


@settings(deadline=None, max_examples=100)
@given(cases, st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 40))
def test_rows_and_dtypes(case, dtype, a, b):
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    n, k = weight.shape
    planes = quantize(weight, scheme, search)
    first, last = sorted((min(a, n), min(b, n)))
    expected = dequantize(planes, scheme, n, k)[first:last].to(dtype)
    result = dequantize(planes, scheme, n, k, dtype, rows=(first, last))
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_squared_error_is_the_error(case):
    spelling, weight, search = case
    scheme = Scheme.parse(spelling)
    planes = quantize(weight, scheme, search)
    w = weight.double()
    error = (w - reference(planes, scheme, *weight.shape).float()).square().sum()
    norm = w.square().sum()
    expected = (error / norm).item() if norm else 0.0
    assert squared_error(weight, planes, scheme) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_weight_of_zeros(spelling):
    scheme, weight = Scheme.parse(spelling), torch.zeros(5, 384)
    for search in SEARCHES:
        planes = quantize(weight, scheme, search)
        assert squared_error(weight, planes, scheme) == 0
        assert torch.equal(dequantize(planes, scheme, 5, 384), weight)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_planes_may_be_given(spelling):
    """Slices of a stack, as experts have them; every byte of a slice is written, and none beside it."""
    scheme, weight = Scheme.parse(spelling), gaussian(6, 384)
    stack = {name: torch.full((3, *p.shape), 77).to(p.dtype) for name, p in scheme.planes(6, 384).items()}
    result = quantize(weight, scheme, out={name: plane[1] for name, plane in stack.items()})
    for name, plane in quantize(weight, scheme).items():
        assert result[name].data_ptr() == stack[name][1].data_ptr()
        assert torch.equal(result[name].float(), plane.float())
        assert (stack[name][::2].float() == torch.tensor(77).to(plane.dtype).float()).all()


def test_strided_planes_may_be_given():
    scheme, weight = Scheme.parse("int4-g32-asym"), gaussian(6, 384)
    wide = {name: torch.zeros(*p.shape, 2, dtype=p.dtype) for name, p in scheme.planes(6, 384).items()}
    quantize(weight, scheme, out={name: plane[..., 1] for name, plane in wide.items()})
    for name, plane in quantize(weight, scheme).items():
        assert torch.equal(wide[name][..., 1], plane)
        assert (wide[name][..., 0] == 0).all()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_meta(spelling):
    scheme = Scheme.parse(spelling)
    planes = quantize(torch.empty(6, 384, dtype=torch.bfloat16, device="meta"), scheme)
    assert {name: (tuple(p.shape), p.dtype) for name, p in planes.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in scheme.planes(6, 384).items()
    }
    assert all(plane.is_meta for plane in planes.values())
    weight = dequantize(planes, scheme, 6, 384, torch.bfloat16, rows=(1, 4))
    assert (weight.is_meta, weight.dtype, tuple(weight.shape)) == (True, torch.bfloat16, (3, 384))


def test_the_weight_is_not_touched():
    for spelling in SPELLINGS:
        weight = gaussian(6, 384).requires_grad_()
        before = weight.detach().clone()
        planes = quantize(weight, Scheme.parse(spelling))
        assert torch.equal(weight, before)
        assert not any(plane.requires_grad for plane in planes.values())


def test_misfits_are_refused_with_the_reason():
    with pytest.raises(SchemeError, match=r"int4 cannot hold a weight of shape \[4, 100\]: K=100 is not a multiple"):
        quantize(torch.zeros(4, 100), Scheme.parse("int4"))
    with pytest.raises(SchemeError, match="K=100"):
        quantize(torch.zeros(4, 100, device="meta"), Scheme.parse("int4"))
    with pytest.raises(SchemeError, match=r"only a matrix can be quantized, got a weight of shape \[4\]"):
        quantize(torch.zeros(4), Scheme.parse("int8"))


def test_an_unknown_search_names_the_nearest():
    with pytest.raises(SchemeError, match="did you mean least_squares"):
        quantize(torch.zeros(4, 128), Scheme.parse("int4"), "least-squares")


@pytest.mark.parametrize("broken", ["shape", "dtype", "missing", "extra", "device"])
def test_planes_that_do_not_fit_are_refused(broken):
    scheme, weight = Scheme.parse("int4"), gaussian(4, 128)
    out = quantize(weight, scheme)
    match broken:
        case "shape":
            out["scales"] = out["scales"][:1]
        case "dtype":
            out["scales"] = out["scales"].float()
        case "missing":
            del out["scales"]
        case "extra":
            out["zeros"] = out["scales"]
        case "device":
            out["scales"] = out["scales"].to("meta")
    with pytest.raises(SchemeError, match="`out` are not the planes of a int4 weight"):
        quantize(weight, scheme, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (300,), (7, 300), (2, 3, 50), (1, 1, 1, 9)])
def test_all_finite(dtype, shape, monkeypatch):
    in_pieces(monkeypatch, 64)
    weight = torch.randn(shape).to(dtype)
    assert all_finite(weight)
    for bad in (math.nan, math.inf, -math.inf):
        for index in {0, weight.numel() // 2, weight.numel() - 1}:
            broken = weight.clone()
            broken.view(-1)[index] = bad
            assert not all_finite(broken)
            assert not all_finite(broken.mT if weight.ndim > 1 else broken)


def test_all_finite_of_nothing():
    assert all_finite(torch.zeros(0, 5))
    assert all_finite(torch.zeros(5, 0))
    assert all_finite(torch.empty(5, 5, device="meta"))


DEFAULT_DTYPE = """
import hashlib, sys, torch
from fxquant import native
from fxquant.codecs import dequantize, quantize
from fxquant.scheme import Scheme
torch.manual_seed(0)
scheme, weight, x = Scheme.parse("nf4-dq"), torch.randn(256, 512), torch.randn(3, 512)
planes = quantize(weight, scheme, "absmax")
torch.set_default_dtype(getattr(torch, sys.argv[1]))
y, weight = native.linear(x, planes, scheme, 256, None), dequantize(planes, scheme, 256, 512)
print([hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (y, weight) if t is not None])
"""


def test_tables_do_not_depend_on_the_default_dtype() -> None:
    # Each in a process of its own: tables are kept, and C++ reads that of double quantization where it lies.
    runs = [
        subprocess.run([sys.executable, "-c", DEFAULT_DTYPE, name], capture_output=True, text=True, check=False)
        for name in ("float32", "bfloat16", "float64")
    ]
    assert {run.returncode for run in runs} == {0}, runs[-1].stderr
    assert len({run.stdout for run in runs}) == 1
