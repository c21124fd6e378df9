"""What devices can do per second, as data: for the cost model, and measured on the CPU at hand by `probe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.inductor import has_bfloat16_products


@dataclass(frozen=True)
class Device:
    """Rates of one device, or of one core of it. A product is one multiply-add: two floating-point operations."""

    name: str
    read: float
    """Bytes of memory per second, of weights that no cache holds."""
    fp32: float
    """Products of float32 per second outside of tensor cores; as many other operations on 32-bit lanes."""
    bf16: float
    """Products per second of the library's bfloat16 matmul, weights prepacked where that is usual."""
    packed: float
    """Products per second of a kernel that decodes weights on the way: as bfloat16 where there are instructions for it,
    else as float32."""
    int8: float
    """Products of int8 codes per second."""
    fp8: float | None = None
    """Products of float8 codes per second; None: they are multiplied as float32."""
    tile: int = 256
    """Rows of x that a weight serves once it is decoded; for more rows it is decoded again."""
    separate: bool = False
    """Whether products have units of their own, so that decoding goes on beside them."""
    source: str = ""
    """Where the rates come from."""


_H200 = Device(
    "H200",
    read=4.3e12,
    fp32=33.4e12,
    bf16=395e12,
    packed=324e12,
    int8=750e12,
    fp8=750e12,
    tile=128,
    separate=True,
    source="planned, not measured: the data sheet's 4.8 TB/s and 67, 989 and 1979 TFLOP/s, times what copies and dense "
    "matmuls of Hopper reach, 0.9, 1, 0.8 and 0.76; packed kernels at 0.82 of the bfloat16 matmul",
)
_AVX512 = Device(
    "AVX-512 core",
    read=15e9,
    fp32=80e9,
    bf16=15e9,
    packed=80e9,
    int8=300e9,
    source="measured by `probe`, torch 2.13: one core of an Intel Xeon with AVX-512 and VNNI, without bfloat16 "
    "instructions, which oneDNN then imitates; under a hypervisor",
)
DEVICES: Mapping[str, Device] = MappingProxyType({"h200": _H200, "avx512": _AVX512})
"""Devices whose rates are known, by a short name. Each says where they come from."""

_BYTES = 512 << 20
_ROUNDS = 5


def probe(nbytes: int = _BYTES, size: int = 1024) -> Device:
    """Measure the CPU at hand, with as many threads as torch uses now; takes about a second and `nbytes` of memory.

    The best of a few rounds each: torch's fastest reduction over an array that caches do not hold, and products of
    square matrices. `packed` is taken to be the rate of bfloat16 where the CPU has instructions for it, else that of
    float32: kernels that take floats apart for integer instructions may do a third more, others do less.

    Args:
        nbytes: of the array; several times the last cache, or bandwidth is that of the cache.
        size: of the matrices.
    """
    threads = torch.get_num_threads()
    with torch.inference_mode():
        fp32, bf16 = _products(size, torch.float32), _bfloat16_products(size)
        return Device(
            f"this CPU, {threads} thread{'s' * (threads > 1)}",
            read=read_rate(nbytes),
            fp32=fp32,
            bf16=bf16,
            packed=bf16 if has_bfloat16_products() else fp32,
            int8=_int8_products(size),
            source=f"measured by fxquant.devices.probe, torch {torch.__version__}",
        )


def read_rate(nbytes: int = _BYTES, rounds: int = _ROUNDS) -> float:
    """Bytes per second at which the CPU reads an array of about `nbytes`, with as many threads as torch uses now.

    The best of some rounds of three reductions.
    """
    array = torch.ones(max(nbytes // 16384 // 2, 1) * 2, 4096)
    flat, halves = array.view(-1), array.view(2, -1)
    ways: list[Callable[[], Tensor]] = [flat.sum, lambda: torch.dot(*halves), lambda: torch.mv(array, flat[:4096])]
    return array.nbytes / min(_seconds(way, rounds) for way in ways)


def _products(size: int, dtype: torch.dtype) -> float:
    x = torch.ones(size, size, dtype=dtype)
    return size**3 / _seconds(lambda: torch.nn.functional.linear(x, x), _ROUNDS)


def _bfloat16_products(size: int) -> float:
    """Of a weight that oneDNN has packed, as Inductor does for constant weights, where torch was built with it."""
    if not torch.backends.mkldnn.is_available():
        return _products(size, torch.bfloat16)
    x = torch.ones(size, size, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(x, size)
    return size**3 / _seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), _ROUNDS)


def _int8_products(size: int) -> float:
    x = torch.ones(size, size, dtype=torch.int8)
    return size**3 / _seconds(lambda: torch.ops.aten._int_mm(x, x.T), _ROUNDS)


def _seconds(run: Callable[[], Tensor], rounds: int) -> float:
    """The shortest of some rounds, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
