"""Against the libraries that define the rules: bitsandbytes, torchao, and torch's own float8 casts."""

import pytest
import torch
from awkward_weights import DTYPES, KINDS, MAGNITUDES, awkward
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxquant.bits import unpack
from fxquant.codecs import dequantize, quantize
from fxquant.codecs.double import dynamic_map
from fxquant.scheme import DOUBLE_QUANT_BLOCK, FLOAT_SCALES, FP4, NF4, ROW, SCALE_TYPES, TENSOR, Block, Scheme

bnb = pytest.importorskip("bitsandbytes.functional")
ao = pytest.importorskip("torchao.quantization.quant_primitives")

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 70)
kinds = st.sampled_from(list(KINDS))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit for bit: not even the sign of a zero may differ."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


def nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """bitsandbytes' codes, flat: its first element is the high nibble."""
    packed = packed.view(torch.uint8).flatten()
    return torch.stack((packed >> 4, packed & 15), -1).flatten()[:count]


@settings(max_examples=200, deadline=None)
@given(
    seeds, sizes, st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from(MAGNITUDES), kinds,
    st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128, 512]), st.booleans(),
)  # fmt: skip
def test_tables_are_bitsandbytes(seed, n, k, dtype, magnitude, kind, element, size, double):
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    packed, state = bnb.quantize_4bit(weight, blocksize=size, quant_type=element, compress_statistics=double)
    planes = quantize(weight, Scheme(element, Block(1, size, flat=True), "fp32", double=double), "absmax")
    assert torch.equal(unpack(planes["codes"], 4, k).flatten(), nibbles(packed, n * k))
    assert same(planes["scales"], state.absmax)
    if double:
        assert state.state2.blocksize == DOUBLE_QUANT_BLOCK
        assert same(planes["scale_scales"], state.state2.absmax)
        assert same(planes["scale_offset"], state.offset.view(1))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("element", ["nf4", "fp4"])
def test_a_whole_layer_is_bitsandbytes(element, double):
    """Large enough for several pieces, for scales of several second-level blocks, and for codes next to every bound."""
    weight = awkward(0, 1024, 1056, torch.bfloat16, 0.02, "normal")
    packed, state = bnb.quantize_4bit(weight, quant_type=element, compress_statistics=double)
    planes = quantize(weight, Scheme.parse(element + "-dq" * double), "absmax")
    assert torch.equal(unpack(planes["codes"], 4, 1056).flatten(), nibbles(packed, weight.numel()))
    assert same(planes["scales"], state.absmax)


@pytest.mark.parametrize(("element", "values"), [("nf4", NF4), ("fp4", FP4)])
def test_ties_and_neighbours_of_every_bound_are_bitsandbytes(element, values):
    table = torch.tensor(sorted(values), dtype=torch.float32)
    middles = (table[:-1] + table[1:]) / 2
    points = [middles, table]
    for direction in (-2.0, 2.0):
        points += [torch.nextafter(p, torch.tensor(direction)) for p in points[:2]]
    weight = torch.zeros(4, 64)
    weight[:, 0] = torch.tensor([1.0, -1.0, 2.0, 1024.0])
    near = torch.cat(points).clamp(-1, 1)
    weight[:, 1:] = 0
    for row, scale in enumerate([1.0, 1.0, 2.0, 1024.0]):
        weight[row, 1:] = near.repeat(2)[row * 21 : row * 21 + 63] * scale
    packed, _ = bnb.quantize_4bit(weight, quant_type=element)
    planes = quantize(weight, Scheme.parse(element), "absmax")
    assert torch.equal(unpack(planes["codes"], 4, 64).flatten(), nibbles(packed, 256))


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, st.integers(1, 3), st.sampled_from(DTYPES), st.sampled_from(["nf4", "fp4"]), st.booleans(), kinds)
def test_dequantize_is_bitsandbytes(seed, n, groups, dtype, element, double, kind):
    """Rows are whole blocks here: with blocks across rows, bitsandbytes' own CPU kernel (0.50) reads wrong scales."""
    weight = awkward(seed, n, 64 * groups, dtype, 1.0, kind)
    packed, state = bnb.quantize_4bit(weight, quant_type=element, compress_statistics=double)
    scheme = Scheme.parse(element + "-dq" * double)
    mine = dequantize(quantize(weight, scheme, "absmax"), scheme, *weight.shape, dtype)
    assert torch.equal(mine, bnb.dequantize_4bit(packed, state))


def test_the_dynamic_map_is_bitsandbytes():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


blocks = st.one_of(
    st.sampled_from([ROW, TENSOR]),
    st.sampled_from([8, 32, 128]).map(lambda size: Block(1, size)),
    st.tuples(st.integers(2, 5), st.integers(1, 16)).map(lambda size: Block(*size)),
)


@settings(max_examples=200, deadline=None)
@given(
    seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from(DTYPES), st.sampled_from(MAGNITUDES), kinds,
    st.sampled_from(["int8", "int4", "uint4", "int8-asym", "int4-asym"]), blocks, st.sampled_from(FLOAT_SCALES),
)  # fmt: skip
def test_integers_are_torchao(seed, bands, tiles, dtype, magnitude, kind, spelling, block, scale_dtype):
    """On the float32 values of the weight, and with the codes chosen at the scale as it is stored."""
    if scale_dtype == "fp16":
        # torchao lets scales overflow to inf and underflow to 0
        magnitude = min(max(magnitude, 1e-3), 1e3)
        assume(kind not in ("one huge", "subnormal"))
    element, _, asymmetric = spelling.partition("-")
    scheme = Scheme(element, block, scale_dtype, "int" if asymmetric or element[0] == "u" else "none")
    n, k = bands * (block.rows or 3), tiles * (block.columns or 7)
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    spec, size = scheme.spec, [block.rows or n, block.columns or k]
    mapping = ao.MappingType.ASYMMETRIC if scheme.zero == "int" else ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR
    stored = torch.uint8 if spec.low == 0 else torch.int8
    scale, zero = ao.choose_qparams_affine(
        weight.float(), mapping, size, stored, spec.low, spec.high, scale_dtype=SCALE_TYPES[scale_dtype].dtype,
        zero_point_dtype=torch.int32, keepdim=True, eps=2.0**-24 if scale_dtype == "fp16" else None,
    )  # fmt: skip
    codes = ao.quantize_affine(weight.float(), size, scale.float(), zero, stored, spec.low, spec.high)
    planes = quantize(weight, scheme, "absmax")
    assert same(planes["scales"], scale)
    assert torch.equal(integers(planes["codes"], scheme, k), codes.long())
    if scheme.zero == "int":
        assert torch.equal(integers(planes["zeros"], scheme, zero.shape[1]), zero.long())
    else:
        assert not zero.any()
    mine = dequantize(planes, scheme, n, k)
    theirs = ao.dequantize_affine(
        codes, size, scale.float(), zero, stored, spec.low, spec.high, output_dtype=torch.float32
    )
    assert same(mine, theirs)


def integers(plane: torch.Tensor, scheme: Scheme, k: int) -> torch.Tensor:
    element = scheme.spec
    return plane.long() if element.dtype is not None else unpack(plane, element.bits, k).long() + element.low


@settings(max_examples=100, deadline=None)
@given(
    seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from(DTYPES), st.sampled_from(MAGNITUDES), kinds,
    blocks, st.sampled_from(FLOAT_SCALES),
)  # fmt: skip
def test_fp8_is_torchs_cast(seed, bands, tiles, dtype, magnitude, kind, block, scale_dtype):
    scheme = Scheme("fp8", block, scale_dtype)
    n, k = bands * (block.rows or 3), tiles * (block.columns or 7)
    rows, columns = block.rows or n, block.columns or k
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    groups = weight.float().view(n // rows, rows, k // columns, columns)
    limits = torch.finfo(SCALE_TYPES[scale_dtype].dtype)
    scale = groups.abs().amax((1, 3), keepdim=True) / 448
    smallest = 2.0**-24 if scale_dtype == "fp16" else torch.finfo(torch.float32).smallest_normal
    scale = scale.clamp(smallest, limits.max).to(SCALE_TYPES[scale_dtype].dtype)
    codes = (groups / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(n, k)
    planes = quantize(weight, scheme, "absmax")
    assert same(planes["scales"], scale.view(planes["scales"].shape))
    assert same(planes["codes"].view(torch.float8_e4m3fn), codes)
    assert not codes.float().isnan().any()
    mine = dequantize(planes, scheme, n, k)
    assert same(mine, (codes.float().view(groups.shape) * scale.float()).view(n, k))


def test_fp8_rows_are_torchao():
    weight = awkward(0, 70, 200, torch.float32, 1.0, "outliers")
    planes = quantize(weight, Scheme.parse("fp8"), "absmax")
    scale = ao._choose_scale_float8(weight, [1, 200], torch.float8_e4m3fn)
    assert same(planes["scales"], scale)
    codes = ao._quantize_affine_float8(weight, scale, torch.float8_e4m3fn)
    assert same(planes["codes"].view(torch.float8_e4m3fn), codes)


def test_every_fp8_code_is_decoded_as_torch_does():
    scheme = Scheme.parse("fp8")
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    planes = {"codes": codes.view(torch.uint8), "scales": torch.full((1, 1), 1.0)}
    torch.testing.assert_close(dequantize(planes, scheme, 1, 256), codes.float(), rtol=0, atol=0, equal_nan=True)
