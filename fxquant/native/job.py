"""What the compiled functions are told: one weight, its planes and its scheme. The fields of `job.h`, in that order."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.scheme import SCALE_TYPES, Element, Scheme

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POWER = 3
_LARGEST_BLOCK = 1 << 16
_TABLE = 64
_FEW_BITS = 3
_POINTERS = (
    *("weight", "codes", "scales", "zeros", "biases", "values", "sorted", "places", "bounds"),
    *("scale_scales", "bias_scales", "levels", "code_values"),
)
_SIZES = (
    "rows",
    "columns",
    "weight_stride",
    "codes_stride",
    "scales_stride",
    "block",
    "first",
    "group",
    "groups_stride",
)
_NUMBERS = (
    *("dtype", "scale_type", "zero_type", "kind", "bits", "flip", "mantissa", "exponent", "search", "threads"),
    *("turns", "flat", "positive", "code_low", "code_step", "code_last", "code_flip"),
)
_REALS = ("low", "high", "floor", "limit", "scale_offset", "offset_limit", "offset_step")


class Job(ctypes.Structure):
    """One call."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_int32) for name in _NUMBERS]
        + [(name, ctypes.c_float) for name in _REALS]
    )


@dataclass(frozen=True)
class Table:
    """The values of an element by code, and what finds the nearest of them."""

    values: Tensor
    sorted: Tensor
    """In order, float32 `[64]`; behind them the last one again."""
    places: Tensor
    """The code of each, int32 `[64]`."""
    bounds: Tensor
    """Halfway between neighbours, float32 `[64]`; infinite behind them."""


def covers(scheme: Scheme, n: int, k: int) -> bool:
    """Whether the compiled functions know the element, the blocks and the scales of a scheme, of one level."""
    kind = SCALE_TYPES[scheme.scale]
    known = kind.kind == "power" or kind.dtype in DTYPES
    return known and scheme.outer is None and covers_blocks(scheme, n, k)


def covers_blocks(scheme: Scheme, n: int, k: int) -> bool:
    """Whether the compiled functions know the element and the blocks of a scheme."""
    element, block = scheme.spec, scheme.block
    columns = min(block.columns or k, n * k)
    return (
        element.kind in ("int", "table", "float")
        and not element.trits
        and (block.rows == 1 or n == 1)
        and 0 < columns <= _LARGEST_BLOCK
        and not scheme.columns
    )


def fill(job: Job, scheme: Scheme, planes: Mapping[str, Tensor]) -> None:
    """Everything that follows from the scheme, and the planes of codes and scales."""
    element, first = scheme.spec, SCALE_TYPES[scheme.scale]
    kind = SCALE_TYPES[scheme.outer.dtype] if scheme.outer else first
    codes, scales = planes["codes"], planes["scales"]
    job.codes, job.scales = codes.data_ptr(), scales.data_ptr()
    job.codes_stride, job.scales_stride = codes.stride(0), scales.stride(0)
    job.scale_type = _POWER if kind.kind == "power" else DTYPES[kind.dtype or torch.uint8]
    job.bits, job.flip = element.bits, 0x80 if element.dtype is torch.int8 else 0
    job.kind = {"int": 0, "table": 1 if element.bits <= 4 else 2, "float": 3}[element.kind]
    job.low, job.high = float(element.low), float(element.high)
    job.threads, job.flat = torch.get_num_threads(), scheme.block.flat
    if element.kind != "int":
        found = table(element)
        job.low, job.high = min(found.values).item(), max(found.values).item()
        job.values, job.sorted = found.values.data_ptr(), found.sorted.data_ptr()
        job.places, job.bounds = found.places.data_ptr(), found.bounds.data_ptr()
    if element.float_dtype is not None:
        info = torch.finfo(element.float_dtype)
        job.low, job.high = -info.max, info.max
        job.mantissa, job.exponent = -round(math.log2(info.eps)), round(math.log2(info.smallest_normal))
    job.positive = not first.signed
    job.turns = scheme.zero == "none" and first.signed and _lopsided(element)
    job.floor, job.limit = _scale_range(scheme)


def _scale_range(scheme: Scheme) -> tuple[float, float]:
    """The magnitudes that scales have, see `fxquant.codecs.scales.scale_format`; of powers of two, the last code."""
    element, kind = scheme.spec, SCALE_TYPES[scheme.scale]
    if scheme.outer is not None:
        return _outer_range(scheme)
    span = 1 << element.bits if element.kind == "int" else 2.0 ** math.ceil(math.log2(element.bound))
    if kind.dtype is None or kind.kind == "power":
        return 0.0, float(int(min(254, 254 - math.ceil(math.log2(span)))))
    info = torch.finfo(kind.dtype)
    floor = 0.0 if element.kind == "table" else torch.finfo(torch.float32).smallest_normal
    limit = min(info.max, torch.finfo(torch.bfloat16).max / span if span > 1 else math.inf)
    return max(floor, info.smallest_normal * info.eps) if floor else 0.0, limit


def _outer_range(scheme: Scheme) -> tuple[float, float]:
    """The magnitudes of second-level numbers, see `fxquant.codecs.second_level.Second.plain`."""
    assert scheme.outer is not None
    kind, outer = SCALE_TYPES[scheme.scale], SCALE_TYPES[scheme.outer.dtype].dtype
    assert outer is not None
    high = torch.finfo(kind.pattern).max if kind.pattern is not None else float(kind.high)
    info, reach = torch.finfo(outer), high * max(scheme.spec.bound + 1, 1.0)
    floor = max(torch.finfo(torch.float32).smallest_normal, info.smallest_normal * info.eps)
    return floor, min(info.max, torch.finfo(torch.bfloat16).max / reach)


def _lopsided(element: Element) -> bool:
    """Whether the sign of a scale matters, and the range of a block does not tell which one is better."""
    if element.kind == "table":
        return sorted(element.values) != sorted(-value for value in element.values)
    return element.kind == "int" and element.low != -element.high and element.bits <= _FEW_BITS


@functools.lru_cache(maxsize=64)
def table(element: Element) -> Table:
    """The table of an element that is not an integer. Of two codes for 0, the lower serves up to 0, the other above."""
    if element.float_dtype is not None:
        values = torch.arange(256, dtype=torch.uint8).view(element.float_dtype).to(torch.float32)
        nothing = torch.empty(0)
        return Table(values, nothing, nothing, nothing)
    values = torch.tensor(element.values, dtype=torch.float32)
    order = torch.argsort(values, stable=True)
    ordered, rest = values[order], _TABLE - len(values)
    bounds = torch.cat(((ordered[:-1] + ordered[1:]) / 2, torch.full((rest + 1,), math.inf)))
    places = torch.cat((order, order[-1:].expand(rest))).to(torch.int32)
    return Table(values, torch.cat((ordered, ordered[-1:].expand(rest))), places, bounds)


def fill_offsets(job: Job, scheme: Scheme, planes: Mapping[str, Tensor]) -> None:
    """The plane of float zeros or biases, and how they are stored: see `fxquant.codecs.offsets.stored_offsets`."""
    dtype = SCALE_TYPES[scheme.scale].dtype
    assert dtype is not None
    if scheme.zero == "float":
        job.zero_type, job.zeros = 2, planes["zeros"].data_ptr()
    else:
        job.biases = planes["biases"].data_ptr()
    job.offset_limit = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max / 2)
    job.offset_step = torch.finfo(dtype).eps
