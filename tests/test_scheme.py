"""Schemes: spelling and printing are inverses, sizes are those of the tensors, contradictions are refused."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from fxquant.bits import TRITS_PER_BYTE
from fxquant.errors import SchemeError
from fxquant.scheme import (
    COLUMNS,
    ELEMENTS,
    FLOAT_SCALES,
    NAMES,
    NF4,
    ROW,
    SCALE_TYPES,
    TENSOR,
    Activation,
    Block,
    Outer,
    Scheme,
    default_block,
    element,
    table_name,
)

sizes = st.integers(1, 300) | st.sampled_from([32, 64, 128, 4096])
blocks = (
    st.sampled_from([ROW, TENSOR]) | st.builds(Block, sizes, sizes) | st.builds(Block, st.just(1), sizes, st.booleans())
)
floats = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-5])
tables = st.sampled_from([2, 4, 8, 16]).flatmap(lambda n: st.lists(floats, min_size=n, max_size=n).map(tuple))
vectors = st.builds(
    "vq{}x{}{}{}{}".format,
    st.sampled_from(["8", "12", "16", "8.8", "13.8"]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["", "r8"]),
    st.sampled_from(["", "s7", "s8"]),
    st.sampled_from(["", "c2"]),
)
elements = st.sampled_from(list(ELEMENTS)) | tables.filter(lambda t: max(map(abs, t)) >= 1e-6).map(table_name) | vectors
activations = st.sampled_from(
    [
        Activation("int8"),
        Activation("fp8", static=True),
        Activation("fp8", group=128),
        Activation("int8", threshold=6.0),
    ]
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Any scheme; the parts that rarely go together are drawn together."""
    block = draw(blocks)
    scale = draw(st.sampled_from([*FLOAT_SCALES, *FLOAT_SCALES, *SCALE_TYPES]))
    outer = None
    if scale not in FLOAT_SCALES and scale != "e8m0":
        over = draw(st.sampled_from([TENSOR, Block(1, block.columns * draw(st.sampled_from([1, 4, 16])))]))
        outer = Outer(draw(st.sampled_from(FLOAT_SCALES)), over)
    columns = draw(st.sets(st.sampled_from(list(COLUMNS)))) if draw(st.booleans()) else set()
    try:
        return Scheme(
            draw(elements),
            block,
            scale,
            draw(st.sampled_from(["none", "none", "int", "float", "bias"])),
            draw(st.sampled_from([False, False, True])),
            outer,
            tuple(name for name in COLUMNS if name in columns),
            draw(st.none() | activations),
        )
    except SchemeError:
        assume(False)
        raise


@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.filter_too_much])
@given(scheme=schemes())
@example(scheme=Scheme("nf4", Block(1, 64, flat=True), "fp32", double=True))
@example(scheme=Scheme("uint4", Block(128, 128), "fp32", "int"))
def test_parse_inverts_str(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f" {str(scheme).upper()} ") == scheme
    assert hash(Scheme.parse(str(scheme))) == hash(scheme)


@given(
    element=st.sampled_from(list(ELEMENTS)),
    parts=st.lists(
        st.sampled_from(
            ["row", "g64", "flat32", "b8x128", "asym", "bias", "fzero", "dq", "bf16", "u4*fp16.g256", "perm"]
        ),
        max_size=4,
    ),
)
def test_str_of_a_parsed_spelling_is_stable_and_no_longer(element: str, parts: list[str]) -> None:
    spelling = "-".join([element, *parts])
    try:
        scheme = Scheme.parse(spelling)
    except SchemeError:
        return
    assert str(scheme) in NAMES or set(str(scheme).split("-")) <= set(spelling.split("-"))
    assert Scheme.parse(str(scheme)) == scheme


@given(
    rows=st.integers(-1, 3),
    columns=st.integers(-1, 3),
    flat=st.booleans(),
    element=st.sampled_from(["int8", "uint4", "nf4"]),
)
def test_every_block_is_refused_or_has_a_spelling(rows: int, columns: int, flat: bool, element: str) -> None:
    zero = "int" if element == "uint4" else "none"
    block = Block(rows, columns, flat)
    if (rows == 1 and columns >= 1) if flat else (rows >= 1 and columns >= 0) or block == TENSOR:
        scheme = Scheme(element, block, "bf16", zero)
        assert Scheme.parse(str(scheme)) == scheme
    else:
        with pytest.raises(SchemeError, match=r"no such (flat )?block"):
            Scheme(element, block, "bf16", zero)


@pytest.mark.parametrize(
    ("spelling", "scheme", "printed"),
    [
        ("int8", Scheme("int8", ROW, "fp32"), "int8"),
        ("int8-row", Scheme("int8", ROW, "fp32"), "int8"),
        ("int8-g128", Scheme("int8", Block(1, 128), "bf16"), "int8-g128"),
        ("int8-b128x128-bf16", Scheme("int8", Block(128, 128), "bf16"), "int8-b128x128"),
        ("int4", Scheme("int4", Block(1, 128), "bf16"), "int4"),
        ("int4-asym-g64", Scheme("int4", Block(1, 64), "bf16", "int"), "int4-g64-asym"),
        ("uint4-g32", Scheme("uint4", Block(1, 32), "bf16", "int"), "uint4-g32"),
        ("uint4-asym", Scheme("uint4", Block(1, 128), "bf16", "int"), "uint4"),
        ("nf4", Scheme("nf4", Block(1, 64, flat=True), "fp32"), "nf4"),
        ("nf4-g64", Scheme("nf4", Block(1, 64), "bf16"), "nf4-g64"),
        ("nf4-dq-flat128", Scheme("nf4", Block(1, 128, flat=True), "fp32", double=True), "nf4-flat128-dq"),
        ("fp4", Scheme("fp4", Block(1, 64, flat=True), "fp32"), "fp4"),
        ("FP8-Tensor", Scheme("fp8", TENSOR, "fp32"), "fp8-tensor"),
        ("fp8-fp16", Scheme("fp8", ROW, "fp16"), "fp8-fp16"),
        ("int3", Scheme("int3", Block(1, 128), "bf16"), "int3"),
        ("ternary", Scheme("ternary", TENSOR, "fp32"), "bitnet"),
        ("int4-b8x0", Scheme("int4", Block(8, 0), "fp32"), "int4-b8x0"),
        ("uint4-g64-fzero-fp16", Scheme("uint4", Block(1, 64), "fp16", "float"), "uint4-g64-fzero-fp16"),
        ("int8-bias", Scheme("int8", ROW, "fp32", "bias"), "int8-bias"),
        ("e2m1-g32-e8m0", Scheme("e2m1", Block(1, 32), "e8m0"), "mxfp4"),
        ("nvfp4", Scheme("e2m1", Block(1, 16), "e4m3", outer=Outer("fp32", TENSOR)), "nvfp4"),
        ("e2m1-g16-e4m3", Scheme("e2m1", Block(1, 16), "e4m3"), "e2m1-g16-e4m3"),
        ("Q4_K", Scheme("uint4", Block(1, 32), "u6", "bias", outer=Outer("fp16", Block(1, 256))), "q4_k"),
        ("int4-perm-g64", Scheme("int4", Block(1, 64), "bf16", columns=("perm",)), "int4-g64-perm"),
        (
            "int4-colbias-perm-colscale",
            Scheme("int4", Block(1, 128), "bf16", columns=("perm", "scale", "bias")),
            "int4-perm-colscale-colbias",
        ),
        ("int8+int8", Scheme("int8", ROW, "fp32", activation=Activation("int8")), "int8+int8"),
        ("int8+int8-outlier6", Scheme("int8", ROW, "fp32", activation=Activation("int8", threshold=6.0)), "llm-int8"),
        (
            "q8_0+int8-g32",
            Scheme("int8", Block(1, 32), "fp16", activation=Activation("int8", group=32)),
            "q8_0+int8-g32",
        ),
        (
            "table(-1,-0.5,+0.50,1e0)-g32+fp8-static",
            Scheme("table(-1,-0.5,0.5,1)", Block(1, 32), "bf16", activation=Activation("fp8", static=True)),
            "table(-1,-0.5,0.5,1)-g32+fp8-static",
        ),
        ("vq13.8x1r8", Scheme("vq13.8x1r8", Block(8, 0), "fp32"), "vq13.8x1r8"),
    ],
)
def test_spellings(spelling: str, scheme: Scheme, printed: str) -> None:
    assert Scheme.parse(spelling) == scheme
    assert str(scheme) == printed


@pytest.mark.parametrize(
    ("spelling", "fact"),
    [
        ("int44", "no element is called 'int44'; did you mean int4"),
        ("", "no element is called ''"),
        ("-g64", "no element is called ''"),
        ("int4-64", "'64' is not understood, or stands there twice; did you mean g64"),
        ("int4-g0", "'g0' is not understood"),
        ("int4-g064", "'g064' is not understood"),
        ("int4-g-64", "'g' is not understood"),
        ("int4-g64-g32", "'g32' is not understood, or stands there twice"),
        ("int4-assym", "'assym' is not understood, or stands there twice; did you mean asym"),
        ("int4-g" + "9" * 5000, "is not understood"),
        ("int4-b0x64", "'b0x64' is not understood"),
        ("mxfp5", "no element is called 'mxfp5'; did you mean mxfp"),
        ("q4_k-g64", "q4_k is a whole scheme, uint4-g32-bias-u6*fp16.g256, and takes no more parts"),
        ("int4+int9", "no activation is called 'int9'; did you mean int8"),
        ("llm-int8+int8", "quantizes activations already"),
        ("int8+int8+int8", "no activation is called 'int8+int8'"),
        ("int8+fp8-outlier6", "no activation is called 'fp8-outlier6'"),
        ("int8+int8-outlier0", "no activation is called 'int8-outlier0'"),
        ("int8+int8-g0", "no activation is called 'int8-g0'"),
        ("table(1,2,3)", "it has 3 values, and tables have 2, 4, 8, 16"),
        ("table(0,0)", "no value is further from 0 than 1e-6"),
        ("table(1,1e30)", "values lie between -1e6 and 1e6"),
        ("table(1,nan)", "no element is called"),
        ("vq30x8", "no such vectors"),
        ("vq8x0", "no such vectors"),
        ("vq8x8-g12", "its blocks consist of whole vectors"),
        ("int4-u6", "u6 scales need a second level"),
        ("int4-fp16*fp32", "fp16 scales have no second level of this kind"),
        ("int4-g32-u6*u6", "'u6*u6' is not understood"),
        ("int4-g48-u6*fp16.g256", "a second-level block, g256, does not consist of whole blocks, g48"),
        ("int4-fzero-e8m0", "zeros have the type of the scales, and cannot be e8m0"),
        ("int4-bias-e4m3", "biases have the type of the scales, and cannot be e4m3"),
        ("ternary-asym", "ternary has no zero point"),
        ("int8-bf16-fp16", "'fp16' is not understood, or stands there twice"),
        ("nf4-asym", "nf4 has no zero point: only integers are asymmetric"),
        ("fp8-asym", "fp8 has no zero point"),
        ("int4-dq", "-dq needs flat blocks with fp32 scales"),
        ("nf4-dq-bf16", "-dq needs flat blocks with fp32 scales"),
    ],
)
def test_spellings_that_mean_nothing(spelling: str, fact: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(fact)):
        Scheme.parse(spelling)


@pytest.mark.parametrize(
    ("parts", "fact"),
    [
        (("int7", ROW, "fp32"), "no element is called 'int7'; did you mean"),
        (
            ("int8", ROW, "float32"),
            "scales cannot be 'float32'; did you mean fp32?; they can be fp32, bf16, fp16, e4m3, e8m0",
        ),
        (("uint4", ROW, "fp32"), "uint4 needs a zero point"),
        (("int8", ROW, "fp32", "maybe"), "no such zero: 'maybe'"),
        (("int8", ROW, "fp32", "none", False, None, ("scale", "perm")), "columns are perm, scale, bias in this order"),
        (("int8", ROW, "fp32", "none", False, None, (), Activation("int8", True, 8)), "no such activation"),
        (("int8", Block(0, 64), "fp32"), "no such block: 0 x 64"),
        (("nf4", Block(2, 64, flat=True), "fp32"), "no such flat block: 2 x 64"),
        (("nf4", Block(1, 0, flat=True), "fp32"), "no such flat block: 1 x 0"),
    ],
)
def test_parts_that_contradict_each_other(parts: tuple[str, Block, str], fact: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(fact)):
        Scheme(*parts)


def grid_of(block: Block, n: int, k: int) -> tuple[int, ...]:
    """The block grid: that of an array whose every entry is its block's index."""
    if block.flat:
        return ((torch.arange(n * k) // block.columns).unique().numel(),)
    rows, columns = block.rows or n, block.columns or k
    return ((torch.arange(n) // rows).unique().numel(), (torch.arange(k) // columns).unique().numel())


def packed_bytes(columns: int, bits: int) -> int:
    return len(range(0, columns * bits, 8))


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])
@given(scheme=schemes(), n=st.integers(1, 70), k=st.integers(1, 70))
def test_planes_cover_every_weight_and_no_more(scheme: Scheme, n: int, k: int) -> None:
    planes, spec, kind = scheme.planes(n, k), scheme.spec, SCALE_TYPES[scheme.scale]
    grid = grid_of(scheme.block, n, k)
    scales = (*grid[:-1], packed_bytes(grid[-1], kind.bits)) if kind.dtype is None else grid
    expected = {"codes", "scales"}
    assert planes["scales"].shape == scales
    if spec.vectors:
        across, down = math.ceil(k / spec.vectors.columns), math.ceil(n / spec.vectors.rows)
        assert planes["codes"].shape == (down, packed_bytes(across, spec.bits))
        expected |= {f"codebook{i}" for i in range(len(spec.vectors.books))} | (
            {"signs"} & {"signs" * (spec.vectors.signs > 0)}
        )
    elif spec.trits:
        assert planes["codes"].shape == (n, math.ceil(k / TRITS_PER_BYTE))
    elif spec.dtype is None:
        assert planes["codes"].shape == (n, packed_bytes(k, spec.bits))
    else:
        assert planes["codes"].shape == (n, k)
    if scheme.zero == "int":
        rows = math.prod(grid[:-1])
        assert planes["zeros"].shape == (rows, grid[-1] if spec.dtype else packed_bytes(grid[-1], spec.bits))
    if scheme.double:
        assert planes["scales"].dtype == torch.uint8
        assert planes["scale_scales"].shape == (math.ceil(grid[0] / 256),)
    if scheme.outer:
        assert planes["scale_scales"].shape == grid_of(scheme.outer.block, n, k)
    offsets = {"none": set(), "int": {"zeros"}, "float": {"zeros"}, "bias": {"biases"}}[scheme.zero]
    second = {"scale_scales"} | ({"bias_scales"} if scheme.zero == "bias" else set()) if scheme.outer else set()
    second |= {"scale_scales", "scale_offset"} if scheme.double else set()
    columns = {{"perm": "perm", "scale": "column_scales", "bias": "column_biases"}[c] for c in scheme.columns}
    static = {"input_scale"} if scheme.activation and scheme.activation.static else set()
    assert set(planes) == expected | offsets | second | columns | static
    total = sum(torch.empty(spec.shape, dtype=spec.dtype).nbytes for spec in planes.values())
    assert scheme.nbytes(n, k) == total
    assert scheme.bits_per_weight(n, k) == pytest.approx(8 * total / (n * k))


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("int8", 8 + 32 / 4096),
        ("int8-tensor", 8 + 32 / 4096**2),
        ("int8-g128", 8 + 16 / 128),
        ("int8-b128x128", 8 + 16 / 128**2),
        ("int4", 4.125),
        ("int4-g64", 4.25),
        ("int4-g32", 4.5),
        ("int4-g64-asym", 4.25 + 4 / 64),
        ("uint4-g128", 4.125 + 4 / 128),
        ("nf4", 4.5),
        ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2),
        ("fp4-flat128", 4.25),
        ("fp8", 8 + 32 / 4096),
        ("int3-g64", 3.25),
        ("int2-g64", 2.25),
        ("table(-1,-0.3,0.3,1)-g64", 2.25),
        ("mxfp4", 4.25),
        ("mxfp8", 8.25),
        ("nvfp4", 4.5 + 32 / 4096**2),
        ("q4_0", 4.5),
        ("q5_1", 6.0),
        ("q2_k", 2.625),
        ("q3_k", 3.4375),
        ("q4_k", 4.5),
        ("q6_k", 6.5625),
        ("iq4_xs", 4.25),
        ("tq2_0", 2.0625),
        ("uint4-g64-fzero-fp16", 4.5),
        ("int4-perm", 4.125 + 32 / 4096),
        ("vq8.8x8-fp16", 2 + 16 / 4096 + 2 * 256 * 8 * 16 / 4096**2),
    ],
)
def test_bits_per_weight(spelling: str, bits: float) -> None:
    assert Scheme.parse(spelling).bits_per_weight(4096, 4096) == pytest.approx(bits, rel=1e-12)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(scheme=schemes(), n=st.integers(1, 40), k=st.integers(1, 600))
def test_misfit_is_a_group_that_does_not_divide_k(scheme: Scheme, n: int, k: int) -> None:
    vectors, sizes = scheme.spec.vectors, []
    if grouped := re.fullmatch(r"g(\d+)", str(scheme.block)):
        sizes.append(int(grouped[1]))
    if scheme.outer and scheme.outer.block.columns:
        sizes.append(scheme.outer.block.columns)
    if scheme.activation and scheme.activation.group:
        sizes.append(scheme.activation.group)
    if vectors:
        sizes.append(max(vectors.columns, 8 if vectors.signs else 1) * vectors.groups)
    expected = any(k % size for size in sizes) or bool(vectors and n % vectors.rows)
    assert (scheme.misfit(n, k) is not None) == expected
    if grouped and k % int(grouped[1]):
        assert scheme.misfit(n, k) == f"K={k} is not a multiple of the group {grouped[1]}"


@given(scheme=schemes(), size=st.sampled_from([16, 32, 64]))
def test_with_group_changes_the_block_alone(scheme: Scheme, size: int) -> None:
    assume(not scheme.double and not scheme.outer and not scheme.spec.vectors)
    changed = scheme.with_group(size)
    assert changed.block == Block(1, size)
    assert replace(changed, block=scheme.block) == scheme


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_for_their_parts(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert scheme == Scheme.parse(NAMES[name])
    assert scheme.weight_only == Scheme.parse(NAMES[name].partition("+")[0])


def test_small_floats_are_those_of_the_mx_formats() -> None:
    dtypes = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    for name, read in (
        ("e2m3", "f6_e2m3_unpacked_to_f32"),
        ("e3m2", "f6_e3m2_unpacked_to_f32"),
        ("e2m1", "f4_unpacked_to_f32"),
    ):
        codes = torch.arange(1 << element(name).bits, dtype=torch.uint8)
        if hasattr(dtypes, read):
            assert torch.equal(torch.tensor(element(name).values), getattr(dtypes, read)(codes))
    assert [element(name).bound for name in ("e2m1", "e2m3", "e3m2")] == [6.0, 7.5, 28.0]


@given(tables)
def test_tables_keep_every_float32(values: tuple[float, ...]) -> None:
    assume(max(map(abs, values)) >= 1e-6)
    assert torch.equal(torch.tensor(element(table_name(values)).values), torch.tensor(values))


def test_elements_hold_what_their_names_say() -> None:
    for name, spec in ELEMENTS.items():
        if found := re.fullmatch(r"(u?)int(\d)", name):
            bits = int(found[2])
            low = 0 if found[1] else -(2 ** (bits - 1))
            assert (spec.kind, spec.bits, spec.low, spec.high) == ("int", bits, low, low + 2**bits - 1)
    assert [(ELEMENTS[name].low, ELEMENTS[name].high) for name in ("ternary", "trit")] == [(-1, 1)] * 2
    bounds = {
        "int8": 127,
        "int4": 7,
        "uint4": 15,
        "nf4": 1,
        "fp4": 1,
        "fp8": 448,
        "fp8e5m2": 57344,
        "ternary": 1,
        "iq4": 127,
    }
    assert {name: ELEMENTS[name].bound for name in bounds} == bounds
    assert all(isinstance(default_block(name), Block) for name in ELEMENTS)
    # NormalFloat4: increasing, an exact zero, eight positive values and seven negative ones.
    assert list(NF4) == sorted(set(NF4))
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)
    fp4 = ELEMENTS["fp4"].values
    assert all(a == -b for a, b in zip(fp4[:8], fp4[8:], strict=True))


def test_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for name in ("nf4", "fp4"):
        values = functional.get_4bit_type(name, device="cpu")
        torch.testing.assert_close(torch.tensor(ELEMENTS[name].values), values, rtol=0, atol=2e-8)


def test_schemes_differ_where_any_part_differs() -> None:
    spellings = [
        "-".join(filter(None, parts))
        for parts in itertools.product(["int4", "int8"], ["row", "g64", "flat64"], ["", "asym"], ["fp32", "fp16"])
    ]
    assert len({Scheme.parse(spelling) for spelling in spellings}) == len(spellings)
    assert len({str(Scheme.parse(spelling)) for spelling in spellings}) == len(spellings)
