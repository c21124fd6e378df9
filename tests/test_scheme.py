"""Schemes: spelling and printing are inverses, sizes are those of the tensors, contradictions are refused."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fxquant.errors import SchemeError
from fxquant.scheme import DEFAULT_BLOCK, ELEMENTS, NF4, ROW, SCALE_DTYPES, TENSOR, Block, Scheme

sizes = st.integers(1, 300) | st.sampled_from([32, 64, 128, 4096])
blocks = (
    st.sampled_from([ROW, TENSOR]) | st.builds(Block, sizes, sizes) | st.builds(Block, st.just(1), sizes, st.booleans())
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    try:
        return Scheme(
            draw(st.sampled_from(list(ELEMENTS))),
            draw(blocks),
            draw(st.sampled_from(list(SCALE_DTYPES))),
            draw(st.sampled_from(["none", "int"])),
            draw(st.booleans()),
        )
    except SchemeError:
        assume(False)
        raise


@settings(deadline=None, max_examples=500)
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
        st.sampled_from(["row", "tensor", "g64", "flat32", "b8x128", "asym", "dq", "bf16", "fp32"]), max_size=4
    ),
)
def test_str_of_a_parsed_spelling_is_stable_and_no_longer(element: str, parts: list[str]) -> None:
    spelling = "-".join([element, *parts])
    try:
        scheme = Scheme.parse(spelling)
    except SchemeError:
        return
    assert set(str(scheme).split("-")) <= set(spelling.split("-"))
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
    if (rows >= 1 and columns >= 1 and (rows == 1 or not flat)) or (block in (ROW, TENSOR) and not flat):
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
        (("int5", ROW, "fp32"), "no element is called 'int5'; did you mean"),
        (("int8", ROW, "float32"), "scales cannot be 'float32'; they can be fp32, bf16, fp16"),
        (("uint4", ROW, "fp32"), "uint4 needs a zero point"),
        (("int8", Block(2, 0), "fp32"), "no such block: 2 x 0"),
        (("int8", Block(0, 64), "fp32"), "no such block: 0 x 64"),
        (("nf4", Block(2, 64, flat=True), "fp32"), "no such flat block: 2 x 64"),
        (("nf4", Block(1, 0, flat=True), "fp32"), "no such flat block: 1 x 0"),
    ],
)
def test_parts_that_contradict_each_other(parts: tuple[str, Block, str], fact: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(fact)):
        Scheme(*parts)


@settings(deadline=None, max_examples=300)
@given(scheme=schemes(), n=st.integers(1, 70), k=st.integers(1, 70))
def test_planes_cover_every_weight_and_no_more(scheme: Scheme, n: int, k: int) -> None:
    """The block grid is that of an array whose every entry is its block's index."""
    planes = scheme.planes(n, k)
    index = torch.arange(n * k).reshape(n, k)
    if scheme.block.flat:
        grid: tuple[int, ...] = ((index // scheme.block.columns).unique().numel(),)
    else:
        rows, columns = scheme.block.rows or n, scheme.block.columns or k
        grid = ((torch.arange(n) // rows).unique().numel(), (torch.arange(k) // columns).unique().numel())
    assert planes["scales"].shape == grid
    codes = torch.empty(planes["codes"].shape, dtype=planes["codes"].dtype)
    capacity = codes.shape[1] * codes.itemsize * 8
    assert codes.shape[0] == n
    assert 0 <= capacity - k * scheme.spec.bits < 8
    assert ("zeros" in planes) == (scheme.zero == "int")
    if scheme.zero == "int":
        assert planes["zeros"].shape[-1] * planes["zeros"].dtype.itemsize * 8 >= grid[-1] * scheme.spec.bits
        assert planes["zeros"].dtype == planes["codes"].dtype
    if scheme.double:
        assert planes["scales"].dtype == torch.uint8
        assert planes["scale_scales"].shape == (math.ceil(grid[0] / 256),)
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
    ],
)
def test_bits_per_weight(spelling: str, bits: float) -> None:
    assert Scheme.parse(spelling).bits_per_weight(4096, 4096) == pytest.approx(bits, rel=1e-12)


@given(scheme=schemes(), n=st.integers(1, 40), k=st.integers(1, 600))
def test_misfit_is_a_group_that_does_not_divide_k(scheme: Scheme, n: int, k: int) -> None:
    grouped = re.fullmatch(r"g(\d+)", str(scheme.block))
    expected = grouped is not None and k % int(grouped[1]) != 0
    assert (scheme.misfit(n, k) is not None) == expected
    if grouped and expected:
        assert scheme.misfit(n, k) == f"K={k} is not a multiple of the group {grouped[1]}"


@given(scheme=schemes(), size=st.sampled_from([16, 32, 64]))
def test_with_group_changes_the_block_alone(scheme: Scheme, size: int) -> None:
    assume(not scheme.double)
    changed = scheme.with_group(size)
    assert changed.block == Block(1, size)
    assert replace(changed, block=scheme.block) == scheme


def test_elements_hold_what_their_names_say() -> None:
    assert {name: (e.bits, e.low, e.high) for name, e in ELEMENTS.items() if e.kind == "int"} == {
        "int8": (8, -128, 127),
        "int4": (4, -8, 7),
        "uint4": (4, 0, 15),
    }
    assert [ELEMENTS[name].bound for name in ("int8", "int4", "uint4", "nf4", "fp4", "fp8")] == [127, 7, 15, 1, 1, 448]
    assert set(DEFAULT_BLOCK) == set(ELEMENTS)
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
