"""Which products have kernels of their own, and that nobody else notices. What the kernels are: test_cuda_code.py."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import get_args
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from fxquant.codecs import quantize
from fxquant.lowering import dispatch, linear
from fxquant.lowering.dispatch import WAYS, ways
from fxquant.lowering.formats import Format, format_of
from fxquant.lowering.shapes import Choice, Shape, Tile, choices, parse, splits, stored
from fxquant.lowering.tiles_source import Variant, source
from fxquant.ops import ABI
from fxquant.scheme import ELEMENTS, NAMES, Scheme, Zero

COVERED = {
    "int4-g128": (4, -8, 128, True, True),
    "int4-g64-asym": (4, 0, 64, True, True),
    "int4-g32-fzero": (4, -8, 32, True, True),
    "uint4-g32": (4, 0, 32, True, True),
    "q4_1": (4, 0, 32, True, True),
    "int8": (8, 0, 256, True, True),
    "nf4": (4, 0, 64, True, True),
    "mxfp4": (4, 0, 32, True, True),
    "fp8": (8, 0, 256, True, True),
    "int3-g64": (3, -4, 64, True, True),
    "int5-g4": (5, -16, 4, True, True),
    "int3-g2": (3, -4, 2, True, False),
    "nf4-dq": (4, 0, 64, False, True),
    "nf4-flat96": (4, 0, 32, False, True),
    "q4_k": (4, 0, 32, False, True),
    "nvfp4": (4, 0, 16, False, True),
    "int4-b8x128": (4, -8, 128, False, True),
    "int4-flat64-asym": (4, 0, 64, False, True),
    "int4-g64-perm": (4, -8, 64, True, True),
    "trit-g64": (2, -1, 64, True, False),
    "iq2_xs": (9, 0, 16, False, False),
}
"""Scheme: bits, addend and group of its format, of a weight with 256 columns, whether scales stand in their plane as
kernels read them, and whether groups consist of whole units."""
PROBE = """
import sys, torch, fxquant.ops
from fxquant.scheme import Scheme
planes = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in Scheme.parse("int4-g32").planes(16, 64).values()]
torch.ops.fxquant.linear(torch.empty(2, 64, device="meta"), planes, [], "int4-g32", [16], fxquant.ops.ABI)
assert "torch._inductor.lowering" not in sys.modules
"""


def test_nothing_is_imported_before_inductor_is() -> None:
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("spelling", COVERED)
def test_formats(spelling: str) -> None:
    form = format_of(Scheme.parse(spelling), 32, 256)
    assert form is not None
    assert (form.bits, form.low, form.group, form.direct, form.in_units) == COVERED[spelling]


@pytest.mark.parametrize("spelling", [*NAMES, *ELEMENTS, "vq8x8"])
def test_every_way_to_store_weights_has_a_format(spelling: str) -> None:
    assert format_of(Scheme.parse(spelling), 256, 512) is not None


@pytest.mark.parametrize(("n", "k"), [(0, 64), (8, 0)])
def test_empty_weights_have_none(n: int, k: int) -> None:
    assert format_of(Scheme.parse("nf4"), n, k) is None


def test_scales_come_last_where_codes_are_exact() -> None:
    wanted = {"int4-g128": True, "int8": True, "int4-g64-asym": True, "mxfp4": True, "iq4_nl": True}
    wanted |= {"nf4": False, "int4-g32-fzero": False, "q4_1": False}
    found = {name: format_of(Scheme.parse(name), 8, 256) for name in wanted}
    assert {name: form.exact(torch.bfloat16) for name, form in found.items() if form} == wanted


def _format(spelling: str) -> Format:
    form = format_of(Scheme.parse(spelling), 64, 512)
    assert form is not None
    return form


@given(
    st.integers(1, 10_000),
    st.sampled_from(["int4-g128", "int8", "int3-g64", "q4_k", "fp8", "trit-g64", "vq8x8"]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_every_product_on_a_gpu_has_a_way(rows: int, spelling: str, dtype: torch.dtype) -> None:
    form = _format(spelling)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        found = ways(torch.device("cuda"), form, dtype, rows)
    assert found[-1] == "decoded"
    assert ("gemv" in found) == (rows == 1)
    assert "tiles" not in found or (dtype != torch.float32 and form.in_units)


def test_old_gpus_have_no_tiles() -> None:
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)):
        assert ways(torch.device("cuda"), _format("int4"), torch.float16, 8) == ("decoded",)


@pytest.mark.parametrize(("name", "hip"), [("cpu", None), ("xpu", None), ("cuda", "6.4")])
def test_other_devices_have_no_way(name: str, hip: str | None) -> None:
    assert set(WAYS) == {"cuda"}
    with mock.patch.object(torch.version, "hip", hip):
        assert ways(torch.device(name), _format("int4"), torch.bfloat16, 1) == ()


@given(st.integers(1, 10_000))
def test_the_tile_for_so_many_rows_comes_first(rows: int) -> None:
    table = stored()
    first, *rest = choices(table, "a GPU that nobody has measured", 4, 100, 100, rows)
    assert {first, *rest} == {Choice(tile) for _, tile in table.general}
    fitting = [Choice(tile) for most, tile in table.general if rows <= most]
    assert first == (fitting or [Choice(table.general[-1][1])])[0]


def test_a_measured_tile_is_preferred_where_it_was_measured() -> None:
    entry = {"rows": 32, "columns": 128, "depth": 64, "warps": 8, "stages": 2}
    shape = {"device": "GPU", "bits": 4, "n": 64, "k": 128}
    general = [{"most": 16, **entry, "rows": 16}]
    table = parse(
        {"general": general, "measured": [{**shape, "most": most, **entry, "splits": most} for most in (32, 8)]}
    )
    assert table.measured[0] == (Shape("GPU", 4, 64, 128, 32), Choice(Tile(**entry), 32))
    assert choices(table, "GPU", 4, 64, 128, 8)[0].splits == 8
    assert choices(table, "GPU", 4, 64, 128, 9)[0].splits == 32
    others = [("another", 4, 64, 128, 8), ("GPU", 8, 64, 128, 8), ("GPU", 4, 65, 128, 8), ("GPU", 4, 64, 128, 33)]
    for other in others:
        assert choices(table, *other) == (Choice(table.general[0][1]),)


def test_a_table_with_other_keys_is_refused() -> None:
    with pytest.raises(TypeError):
        parse({"general": [{"most": 16, "rows": 16}], "measured": []})


@given(st.integers(1, 500), st.integers(1, 1000), st.integers(1, 200))
def test_splits_are_equal_parts_and_no_more_than_a_gpu_needs(programs: int, steps: int, processors: int) -> None:
    parts = splits(programs, steps, processors)
    assert steps % parts == 0
    assert parts == 1 or (steps // parts >= 4 and parts // 2 * programs < processors)
    assert splits(processors, steps, processors) == 1


def test_few_programs_are_split() -> None:
    assert splits(32, 32, 132) == 4
    assert splits(1, 64, 132) == 8
    assert splits(1, 7, 132) == 1


def test_every_variant_has_a_name_and_a_source_of_its_own() -> None:
    kinds = [(False, None), (True, None), (False, torch.float8_e4m3fn), (False, torch.float8_e5m2)]
    flags = itertools.product([2, 4, 8], get_args(Zero), kinds, *[[False, True]] * 5)
    variants = [Variant(bits, zero, *kind, *rest) for bits, zero, kind, *rest in flags]
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        text = source(variant)
        assert all(f'"{name}"' in text for name in variant.inputs)
        assert ("T + " in text, "B + " in text, "part" in text) == (variant.table, variant.bias, variant.split)


@pytest.mark.parametrize(("m", "python"), [(1, True), (5, True), (1, False)])
def test_on_a_cpu_the_op_stays_one_call(m: int, python: bool) -> None:
    planes = list(quantize(torch.randn(512, 256), Scheme.parse("int4-g32"), "absmax").values())

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.ops.fxquant.linear(x, planes, [], "int4-g32", [512], ABI))

    x = torch.randn(m, 256)
    torch._dynamo.reset()
    options = {"fx_graph_cache": False, "cpp_wrapper": not python}
    y, (code, *_) = run_and_get_code(torch.compile(fn, options=options), x)
    # From C++, torch 2.13 calls the dispatcher, and 2.11 Python.
    in_cpp = ['findSchemaOrThrow("fxquant::linear"', 'PyUnicode_FromString("torch.ops.fxquant.linear.default"']
    calls = [" = torch.ops.fxquant.linear.default("] if python else in_cpp
    assert sum(map(code.count, calls)) == 1
    assert torch.equal(y, fn(x))


@pytest.fixture
def loops_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of a GPU's ways, compiled for a CPU."""
    gemv, decoded = (
        dispatch.Span("gemv", None, (torch.float32,), 1),
        dispatch.Span("decoded", None, (torch.float32,), None),
    )
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "WAYS", {"cpu": (gemv, decoded)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    torch._dynamo.reset()


@pytest.mark.parametrize("m", [1, 3])
def test_tables_in_a_graph_inside_of_a_graph(m: int, loops_on_a_cpu: None) -> None:
    planes = list(quantize(torch.randn(64, 64), Scheme.parse("nf4"), "absmax").values())

    @torch.compiler.nested_compile_region
    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.ops.fxquant.linear(x, planes, [], "nf4", [64], ABI))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return layer(layer(x))

    x = torch.randn(m, 64)
    y = torch.compile(fn, fullgraph=True, options={"fx_graph_cache": False})(x)
    torch.testing.assert_close(y, fn(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 0), (0, 0)])
def test_inputs_without_features_have_codes(shape: tuple[int, int], loops_on_a_cpu: None) -> None:
    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        return torch.ops.fxquant.quantize_activation(x, "int8", None, ABI)

    codes, scales = torch.compile(fn, options={"fx_graph_cache": False})(torch.randn(shape))
    assert (codes.shape, scales.shape) == (shape, (shape[0], 1))


@pytest.mark.parametrize("m", [1, 3])
def test_the_same_codes_with_other_scales(m: int, loops_on_a_cpu: None) -> None:
    planes = list(quantize(torch.randn(32, 64), Scheme.parse("int8+int8"), "absmax").values())

    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        codes, scales = torch.ops.fxquant.quantize_activation(x, "int8", None, ABI)
        on_codes = torch.ops.fxquant.linear_on_codes
        return [on_codes(x, codes, s, planes, [], "int8+int8", [32], ABI) for s in (scales, 2 * scales)]

    x = torch.randn(m, 64)
    for y, wanted in zip(torch.compile(fn, options={"fx_graph_cache": False})(x), fn(x), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("spellings", [("int8", "int4-g64"), ("int4-g64", "int8"), ("int4-g64", "int4-g64")])
def test_readers_of_one_row_have_it_each_in_their_own_order(spellings: tuple[str, str], loops_on_a_cpu: None) -> None:
    planes = [list(quantize(torch.randn(32, 256), Scheme.parse(s)).values()) for s in spellings]

    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        x = x * 2 + 1
        return [torch.ops.fxquant.linear(x, p, [], s, [32], ABI) for p, s in zip(planes, spellings, strict=True)]

    x = torch.randn(1, 256)
    for y, wanted in zip(torch.compile(fn, options={"fx_graph_cache": False})(x), fn(x), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
