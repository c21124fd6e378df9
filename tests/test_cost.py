"""The cost model against planes that exist, tensors that are counted, and times that are compared number by number."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import codecs
from fxquant.cost import K, M, N, Way, cost, decoding_operations, overtakes, weight_bytes
from fxquant.devices import DEVICES, Device, probe, read_rate
from fxquant.errors import SchemeError
from fxquant.inductor import has_bfloat16_products
from fxquant.scheme import ELEMENTS, NAMES, Scheme

SCHEMES = (
    *("int4", "int4-g64-asym", "uint4-g64-fzero", "uint4-g32-bias", "int3-g64", "int5-g32", "int8-tensor", "int4-perm"),
    *("nf4", "nf4-dq", "fp8-b128x128", "trit-g64", "vq8.8x8", "int8+int8-static", "int4-g128+int8", "fp8+fp8", *NAMES),
)
WAYS: tuple[Way, ...] = ("packed", "decoded", "full")
SIZES = st.integers(1, 20000)


def at(expression: object, m: int, n: int, k: int) -> int:
    return int(expression.subs({M: m, N: n, K: k}))  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEMES), SIZES, SIZES)
def test_weight_bytes_are_those_of_the_planes(spelling: str, n: int, k: int) -> None:
    scheme = Scheme.parse(spelling)
    assert at(weight_bytes(scheme), 1, n, k) == scheme.nbytes(n, k)


@pytest.mark.parametrize("spelling", [s for s in SCHEMES if Scheme.parse(s).encodable and "static" not in s])
@pytest.mark.parametrize(("n", "k"), [(24, 256), (5, 768)])
def test_weight_bytes_are_those_of_tensors(spelling: str, n: int, k: int) -> None:
    scheme = Scheme.parse(spelling)
    planes = codecs.quantize(torch.randn(n, k), scheme.weight_only, "absmax")
    counted = sum(plane.nbytes for plane in planes.values())
    for m in (1, 7):
        x, y = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(m, n, dtype=torch.bfloat16)
        codes = x.numel() if scheme.activation else 0
        found = cost(spelling, "packed", DEVICES["avx512"])
        assert at(found.read, m, n, k) == counted + x.nbytes + codes
        assert at(found.written, m, n, k) == y.nbytes + codes
        assert at(found.products, m, n, k) == m * n * k


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 500), SIZES, SIZES)
def test_a_full_weight_is_read_once_and_a_decoded_one_goes_through_memory(m: int, n: int, k: int) -> None:
    device = DEVICES["h200"]
    full, decoded, packed = (cost("int4", way, device) for way in ("full", "decoded", "packed"))
    assert at(full.read, m, n, k) == 2 * (n * k + m * k)
    assert at(full.written, m, n, k) == at(packed.written, m, n, k) == 2 * m * n
    assert at(decoded.read - packed.read, m, n, k) == 2 * n * k
    assert at(decoded.written - packed.written, m, n, k) == 2 * n * k
    assert at(full.decoding, m, n, k) == 0
    assert {at(found.products, m, n, k) for found in (full, decoded, packed)} == {m * n * k}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("group", ["g32", "g128"])
def test_more_bits_are_more_bytes_and_no_less_time_where_bytes_bind(device: Device, group: str) -> None:
    found = [cost(f"int{bits}-{group}", "packed", device) for bits in (2, 3, 4, 5, 6, 8)]
    read = [at(x.read, 1, 4096, 4096) for x in found]
    assert read == sorted(set(read))
    slow = dataclasses.replace(device, read=1e9)
    times = [cost(f"int{bits}-{group}", "packed", slow).time(1, 4096, 4096) for bits in (2, 3, 4, 5, 6, 8)]
    assert times == sorted(set(times))
    assert times == [pytest.approx((r + 2 * 4096) / 1e9) for r in read]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([s for s in SCHEMES if "vq" not in s]),
    st.sampled_from(sorted(DEVICES)),
    st.permutations(WAYS),
    st.sampled_from([(4096, 4096), (1536, 8960), (256, 65536), (100, 512)]),
)
def test_at_the_crossover_both_ways_take_the_same_time(
    spelling: str, name: str, ways: list[Way], shape: tuple[int, int]
) -> None:
    (later, earlier, _), device, (n, k) = ways, DEVICES[name], shape
    slow, fast = (cost(spelling, way, device).seconds.subs({N: n, K: k}) for way in (later, earlier))
    crossover = overtakes(later, earlier, spelling, device, n, k)
    before = 10**7 if crossover is None else crossover
    for m in (1, 2, 9, 100, 1000, 30000, 10**6):
        if m < before:
            assert slow.subs(M, m) > fast.subs(M, m)
    if crossover == 1:
        assert slow.subs(M, 1) <= fast.subs(M, 1)
    elif crossover is not None:
        m = sympy.Rational(crossover.numerator, crossover.denominator)
        assert m > 1
        assert slow.subs(M, m) == fast.subs(M, m)


def test_a_device_with_bfloat16_units_has_a_crossover_that_its_rates_explain() -> None:
    device = Device("made up", read=1e12, fp32=50e12, bf16=100e12, packed=100e12, int8=1e15, tile=10**9, separate=True)
    n = k = 1 << 14
    found = overtakes("full", "packed", "int4", device, n, k)
    assert found is not None
    # Both compute the same, so they are equal from where bfloat16 is bound by products: 2 bytes / 1e12 = M / 100e12.
    assert float(found) == pytest.approx(200, rel=0.05)
    assert overtakes("packed", "full", "int4", device, n, k) == 1
    assert overtakes("decoded", "packed", "int4", device, n, k) is None


@pytest.mark.parametrize(
    ("rates", "bound"),
    [({"read": 1e3}, "bytes"), ({"packed": 1e3}, "products"), ({"fp32": 1e3}, "decoding")],
)
@pytest.mark.parametrize("separate", [False, True])
def test_the_slowest_part_is_the_bound(rates: dict[str, float], bound: str, separate: bool) -> None:
    device = dataclasses.replace(DEVICES["avx512"], separate=separate, **rates)
    found = cost("int4", "packed", device)
    assert found.bound(4, 512, 512) == bound
    part = found.phases[0].parts(device)[bound].subs({M: 4, N: 512, K: 512})
    assert float(part) <= found.time(4, 512, 512) <= 1.001 * float(part)


def test_codes_on_codes_have_the_rate_of_their_products() -> None:
    device, sizes = DEVICES["h200"], (4096, 4096, 4096)
    times = {s: cost(s, "packed", device).time(*sizes) for s in ("int4", "int4+int8", "fp8+fp8", "nf4+int8")}
    assert times["int4+int8"] == pytest.approx(4096**3 / device.int8)
    assert times["fp8+fp8"] == pytest.approx(4096**3 / device.fp8)
    assert times["nf4+int8"] == times["int4"] == pytest.approx(4096**3 / device.packed)
    cpu = DEVICES["avx512"]  # without products of float8
    assert cost("fp8+fp8", "packed", cpu).time(*sizes) >= 4096**3 / cpu.fp32


def test_rows_beyond_a_tile_are_decoded_for_again() -> None:
    device = DEVICES["avx512"]
    once, twice = (cost("nf4-tensor-fp32", "packed", device).decoding.subs({N: 1, K: 1, M: m}) for m in (1, 512))
    assert twice - 512 == 2 * (once - 1)  # a sum per row is scaled besides


@pytest.mark.parametrize("name", ELEMENTS)
def test_codes_in_bytes_of_their_own_take_no_more_to_decode_than_packed_ones(name: str) -> None:
    assert 1 <= decoding_operations(ELEMENTS[name]) <= 2
    assert decoding_operations(ELEMENTS["int8"]) <= decoding_operations(ELEMENTS[name])


def test_no_such_scheme_is_an_error() -> None:
    with pytest.raises(SchemeError, match="int44"):
        cost("int44", "packed", DEVICES["h200"])


def test_no_such_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fused'; there are packed, decoded, full"):
        overtakes("full", "fused", "int4", DEVICES["h200"], 64, 64)  # type: ignore[arg-type]


def test_the_cpu_at_hand_can_be_measured() -> None:
    found = probe(nbytes=1 << 20, size=64)
    assert min(found.read, found.fp32, found.bf16, found.packed, found.int8) > 0
    assert found.packed == (found.bf16 if has_bfloat16_products() else found.fp32)
    assert str(torch.get_num_threads()) in found.name
    assert torch.__version__ in found.source
    assert cost("int4", "packed", found).time(1, 256, 256) > 0
    assert read_rate(1 << 20, rounds=1) > 0


def test_every_device_says_where_its_rates_come_from() -> None:
    for device in DEVICES.values():
        assert device.source.startswith(("measured", "planned"))


def test_sympy_is_not_imported_before_a_cost_is_asked_for() -> None:
    code = "import sys, fxquant.reports, fxquant.plans; assert 'sympy' not in sys.modules; import fxquant.cost"
    subprocess.run([sys.executable, "-c", code], check=True)
