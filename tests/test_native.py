"""The compiled codecs against plain torch: the same bits, but for scales that a search finds; these are as good."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.exc import CppCompileError

from fxquant import codecs, native
from fxquant.inductor import compile_cpp
from fxquant.native import library
from fxquant.scheme import Scheme

QUANTIZED = (
    *("int8", "int8-g16", "int6-g8", "int5-g24-fp16", "int4", "int4-g5-fp16", "int4-row", "int3-g8", "int2-g17-fp32"),
    *("uint8-g32", "uint6-g10", "uint5-g16", "uint4-g64", "uint4-g3", "uint3-row", "uint2-g8-fp16", "int4-g16-asym"),
    *("int8-g32-asym", "int4-flat64", "int8-flat24", "ternary-g16", "nf4", "nf4-g32", "nf4-flat24-bf16", "fp4"),
    *("iq4-g32-fp16", "iq4-g20", "e2m1-g16", "mxfp4", "mxfp6", "e3m2-g40-fp16", "mxfp8", "fp8", "fp8-g24", "fp8e5m2"),
    *("fp8-flat64", "table(-1,1)-g16", "table(0.5,1,2,3)-g16", "table(-7,-3,-2,-1,0,1,2,5)-g24-fp16"),
)
READ = [*QUANTIZED, "uint4-g16-fzero", "uint4-g16-bias", "int3-g24-fzero-fp16", "uint8-row-bias", "int4-g8+int8"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("compiled_codecs")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def empty(scheme: Scheme, n: int, k: int) -> dict[str, Tensor]:
    """Planes full of what no codec would write, so that a byte left out shows."""
    planes = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in scheme.planes(n, k).items()}
    for plane in planes.values():
        plane.view(torch.uint8).fill_(0xA5)
    return planes


def compiled_planes(weight: Tensor, scheme: Scheme, search: str) -> dict[str, Tensor]:
    planes = empty(scheme, *weight.shape)
    with native.from_size(0):
        assert native.quantize(weight, scheme, search, planes), "not covered"
    return planes


def plain_planes(weight: Tensor, scheme: Scheme, search: str) -> dict[str, Tensor]:
    with native.from_size(math.inf):
        return codecs.quantize(weight, scheme, search)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, plane in expected.items():
        assert torch.equal(bits(found[name]), bits(plane)), name


def weights(kind: str, n: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal weights, and what makes arithmetic awkward. Float16 holds no huge ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    top = torch.finfo(dtype).max
    match kind:
        case "zeros":
            x = torch.where(torch.rand(n, 1, generator=generator) < 0.5, x, 0.0)
            x.view(-1)[:: max(k // 3, 1)] = -0.0
        case "ties":
            x = (2 * x).round() / 2
        case "tiny":
            x *= 1e-38 if dtype != torch.float16 else 1e-7
        case "huge":
            x = (x * top / 3).clamp(-top, top)
        case "positive":
            x = x.abs() + 3
        case "mixed":
            x *= torch.exp2(torch.randint(-40, 15, (n, k), generator=generator).float())
            x.clamp_(-top, top)
    return x.to(dtype)


KINDS = ("normal", "zeros", "ties", "tiny", "huge", "positive", "mixed")


@pytest.mark.parametrize("spelling", QUANTIZED)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_absmax_has_the_bits_of_plain_torch(spelling: str, data: st.DataObject) -> None:
    scheme = Scheme.parse(spelling)
    n = data.draw(st.integers(1, 9), "rows")
    unit = scheme.block.columns if scheme.block.columns and not scheme.block.flat else 1
    k = unit * data.draw(st.integers(1, max(2, 150 // unit)), "blocks")
    if scheme.block.flat and k * scheme.spec.bits % 8:
        k += 1  # rows that end within a byte, and blocks that run on from row to row: plain torch
    weight = weights(*data.draw(st.tuples(st.sampled_from(KINDS), st.just(n), st.just(k), st.sampled_from(DTYPES))), 0)
    if not scheme.block.flat and data.draw(st.booleans(), "strided"):
        weight = torch.cat((weight, weight), 1)[:, 1 : k + 1] if data.draw(st.booleans()) else weight.repeat(2, 1)[::2]
    check_same(compiled_planes(weight, scheme, "absmax"), plain_planes(weight, scheme, "absmax"))


@pytest.mark.parametrize("shape", [(3, 4096 * 2 + 128), (2, 65536), (1, 12288)])
def test_long_rows_are_cut_where_bytes_end(shape: tuple[int, int]) -> None:
    for spelling in ("int3-g128", "int4-g64-asym", "int5-row", "nf4", "int8-g4096"):
        if shape[1] % (Scheme.parse(spelling).block.columns or 1) == 0:
            weight = torch.randn(shape).bfloat16()
            scheme = Scheme.parse(spelling)
            check_same(compiled_planes(weight, scheme, "absmax"), plain_planes(weight, scheme, "absmax"))


def test_strided_planes_are_written_in_place() -> None:
    scheme, weight = Scheme.parse("uint4-g16"), torch.randn(6, 64)
    whole = {name: torch.cat((plane, plane)) for name, plane in empty(scheme, 6, 64).items()}
    rows = {name: plane[::2] for name, plane in whole.items()}
    with native.from_size(0):
        assert native.quantize(weight, scheme, "absmax", rows)
    check_same(rows, plain_planes(weight, scheme, "absmax"))
    assert all((plane[1::2].contiguous().view(torch.uint8) == 0xA5).all() for plane in whole.values())


@pytest.mark.parametrize("spelling", READ)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_decoding_has_the_bits_of_plain_torch(spelling: str, data: st.DataObject) -> None:
    scheme = Scheme.parse(spelling)
    n = data.draw(st.integers(1, 9), "rows")
    unit = scheme.block.columns if scheme.block.columns and not scheme.block.flat else 1
    k = unit * data.draw(st.integers(1, max(2, 150 // unit)), "blocks")
    first = data.draw(st.integers(0, n - 1), "first")
    last = data.draw(st.integers(first + 1, n), "last")
    generator = torch.Generator().manual_seed(n * k)
    planes = empty(scheme, n, k)
    for name, plane in planes.items():
        if plane.dtype.is_floating_point:
            planes[name] = torch.randn(plane.shape, generator=generator).to(plane.dtype)
        else:
            bits(plane).copy_(torch.randint(0, 250, bits(plane).shape, generator=generator, dtype=torch.uint8))
            plane.view(torch.uint8).copy_(bits(plane))
    dtype = data.draw(st.sampled_from(DTYPES))
    out = torch.full((last - first, k + 3), -7.0, dtype=dtype)
    with native.from_size(0):
        assert native.dequantize(planes, scheme, n, k, first, out[:, :k]), "not covered"
    with native.from_size(math.inf):
        expected = codecs.dequantize(planes, scheme, n, k, dtype, (first, last))
    assert torch.equal(out[:, :k].isnan(), expected.isnan())
    assert torch.equal(bits(out[:, :k].nan_to_num(0)), bits(expected.nan_to_num(0)))
    assert (out[:, k:] == -7).all()


def distributions(n: int, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(n, k, generator=generator)
    chi = torch.randn(5, n, k, generator=generator).square().mean(0)
    outliers = torch.where(torch.rand(k, generator=generator) < 0.02, 20.0, 1.0)
    return {"normal": normal, "student": normal / chi.sqrt(), "outliers": normal * outliers}


@pytest.mark.parametrize(
    "spelling", ["int8", "int4", "int4-g32-fp16", "uint4-g64", "int3-g64", "uint2-g64", "nf4", "iq4", "mxfp4", "fp8"]
)
def test_a_search_is_as_good_as_that_of_plain_torch(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    for name, weight in distributions(64, 1024).items():
        found, plain = compiled_planes(weight, scheme, "least_squares"), plain_planes(weight, scheme, "least_squares")
        ratio = codecs.squared_error(weight, found, scheme) / codecs.squared_error(weight, plain, scheme)
        assert ratio < 1.003, (name, ratio)


@pytest.mark.parametrize("spelling", [s for s in QUANTIZED if "flat" not in s])
@settings(max_examples=5, deadline=None)
@given(kind=st.sampled_from(KINDS), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_search_never_has_a_larger_error_than_absmax(spelling: str, kind: str, blocks: int, seed: int) -> None:
    scheme = Scheme.parse(spelling)
    k = blocks * (scheme.block.columns or 37)
    weight = weights(kind, 4, k, torch.float32, seed)
    errors = []
    for search in ("least_squares", "absmax"):
        planes = compiled_planes(weight, scheme, search)
        with native.from_size(math.inf):
            off = (codecs.dequantize(planes, scheme, 4, k) - weight).double()
        errors.append(off.view(4, -1, scheme.block.columns or k).square().sum(-1))
    # Beyond float32's rounding of a weight itself.
    slack = 1e-6 * errors[1] + 1e-12 * weight.double().view(*errors[1].shape, -1).square().sum(-1)
    assert (errors[0] <= errors[1] + slack).all()


@pytest.mark.usefixtures("one_thread")
def test_threads_change_nothing() -> None:
    weight = torch.randn(37, 768)
    for spelling in ("int4-g64", "uint3-g32", "nf4", "fp8-row"):
        scheme, found = Scheme.parse(spelling), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            planes = compiled_planes(weight, scheme, "least_squares")
            out = torch.empty_like(weight)
            with native.from_size(0):
                assert native.dequantize(planes, scheme, 37, 768, 0, out)
            found.append({**planes, "weight": out})
        check_same(found[0], found[1])


@pytest.mark.parametrize("spelling", ["nf4-dq", "int8-b4x8", "int4-tensor", "trit-g10", "int4-perm"])
def test_what_is_not_covered_is_left_to_plain_torch(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(8, 80 if "trit" in spelling else 256)
    planes = empty(scheme, *weight.shape)
    with native.from_size(0):
        assert not native.quantize(weight, scheme, "absmax", planes)
        check_same(planes, empty(scheme, *weight.shape))


def test_tensors_that_the_compiled_codecs_cannot_take() -> None:
    scheme = Scheme.parse("int4-g16")
    with native.from_size(0):
        for weight in (torch.randn(32, 32).t(), torch.randn(32, 32).double(), torch.randn(32, 32, device="meta")):
            assert not native.quantize(weight, scheme, "absmax", empty(scheme, 32, 32))
        planes, out = compiled_planes(torch.randn(32, 32), scheme, "absmax"), torch.empty(32, 32)
        assert native.dequantize(planes, scheme, 32, 32, 0, out)
        assert not native.dequantize({**planes, "codes": planes["codes"][:31]}, scheme, 32, 32, 0, out)
        assert not native.dequantize({**planes, "scales": planes["scales"].half()}, scheme, 32, 32, 0, out)
        assert not native.dequantize(planes, scheme, 32, 32, 1, out)
        assert not native.dequantize(planes, scheme, 32, 32, 0, out.double())


def test_small_weights_are_left_to_plain_torch() -> None:
    scheme = Scheme.parse("int4-g16")
    assert not native.quantize(torch.randn(16, 16), scheme, "absmax", empty(scheme, 16, 16))
    assert native.quantize(torch.randn(256, 256), scheme, "absmax", empty(scheme, 256, 256))


def test_codecs_use_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise AssertionError("plain torch")

    weight, scheme = torch.randn(256, 256), Scheme.parse("int4-g16")
    monkeypatch.setattr("fxquant.codecs.encode.family_of", fails)
    monkeypatch.setattr("fxquant.codecs.decode.family_of", fails)
    planes = codecs.quantize(weight, scheme)
    assert (codecs.dequantize(planes, scheme, 256, 256) - weight).abs().max() < 0.5
    with native.from_size(math.inf), pytest.raises(AssertionError, match="plain torch"):
        codecs.quantize(weight, scheme)


def test_without_a_compiler_there_is_one_warning_and_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(library, "compile_cpp", fails)
    library.library.cache_clear()
    weight, scheme = torch.randn(256, 256), Scheme.parse("int4-g16")
    try:
        with pytest.warns(UserWarning, match="could not be compiled: no g\\+\\+ here"):
            planes = codecs.quantize(weight, scheme)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            codecs.dequantize(codecs.quantize(weight, scheme), scheme, 256, 256)
        check_same(planes, plain_planes(weight, scheme, "least_squares"))
    finally:
        library.library.cache_clear()


def test_subnormal_numbers_stay_what_they_are() -> None:
    assert library.library() is not None  # GCC links start-up code that flushes them to 0 into -ffast-math libraries
    assert (torch.tensor([1e-40]) * 1 != 0).all()


def test_nothing_is_built_at_import() -> None:
    code = "import sys, fxquant.codecs; print('torch._inductor.codecache' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(("there", "ours", "denied"), [(True, True, False), (True, False, True), (False, False, False)])
def test_matrix_units_that_the_system_denies_are_not_compiled_for(
    there: bool, ours: bool, denied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of pairs are compiled instead, which those units would be in the way of."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: ours)
    flags: list[str] = []
    monkeypatch.setattr(library, "compile_cpp", lambda text, given: flags.extend(given))
    assert library.load("nothing", "", ("bits.h",), contract=False) == (None,)
    assert ("-U__AMX_BF16__" in flags) == denied


def test_what_matrix_units_define_can_be_taken_back() -> None:
    """A macro of the compiler's own, that it defines for processors with them."""
    source = 'extern "C" int multiplies() {\n#ifdef __AMX_BF16__\nreturn 1;\n#else\nreturn 0;\n#endif\n}'
    try:
        built = [compile_cpp(source, ("-march=sapphirerapids", *more)) for more in ((), ("-U__AMX_BF16__",))]
    except CppCompileError as error:
        pytest.skip(f"a compiler that does not know such processors: {error}")
    assert [one.multiplies() for one in built] == [1, 0]
