"""What the compiled product is told, and which schemes it knows."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.native.job import DTYPES
from fxquant.native.matmul_levels import Level, fill_offsets, fill_scales
from fxquant.native.places import Place
from fxquant.scheme import SCALE_TYPES, Element, PlaneSpec, Scheme

_UNIT = 16
"""Weights of a row that are decoded at once; blocks consist of whole units."""
_INT, _TABLE, _E4M3, _E5M2 = 0, 1, 2, 3
_ZEROS = {"none": 0, "int": 1, "float": 1, "bias": 2}
_GIVEN, _MADE, _MADE_AT = 1, 2, 3


class Product(ctypes.Structure):
    """One call. The fields of `Product` in `matmul.h`, in that order."""

    held: Tensor
    """What it points to, besides arguments of the call."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "y", "addend", "codes", "values", "ids")]
        + [("scales", Level), ("offsets", Level)]
        + [(name, ctypes.c_int64) for name in ("slots", "picks", "experts", "rows", "columns", "block")]
        + [(name, ctypes.c_int64) for name in ("x_stride", "y_stride", "addend_expert")]
        + [(name, ctypes.c_int64) for name in ("codes_stride", "codes_expert")]
        + [("x_scales", ctypes.c_void_p), ("x_scales_stride", ctypes.c_int64), ("x_group", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in ("dtype", "x_type", "addend_type", "kind", "bits", "low", "zero")]
        + [("x_codes", ctypes.c_int32), ("threads", ctypes.c_int32)]
    )


@functools.lru_cache(maxsize=1024)
def covered_planes(scheme: Scheme, n: int, k: int) -> dict[str, PlaneSpec] | None:
    """The planes of an `[n, k]` weight under a scheme that the compiled product knows; None under another.

    Integers, tables and float8 in blocks of whole units of 16 columns, with scales of one level or two, and any kind of
    zero; integers where activations are int8. Not: vectors, base 3, columns with a bias, other activations, blocks that
    run on from row to row.
    """
    element, block = scheme.spec, scheme.block
    columns = block.columns or k
    fits = columns % _UNIT == 0 or (columns >= k and not block.flat)
    known = element.kind != "vector" and not element.trits and _takes_activation(scheme, k)
    if not (n > 0 and k > 0 and fits and known) or "bias" in scheme.columns:
        return None
    if block.flat and (k % columns or not _whole_bytes(scheme, k // columns)):
        return None
    return scheme.planes(n, k)


def _takes_activation(scheme: Scheme, k: int) -> bool:
    """Whether inputs are multiplied as they are, or as int8 codes with integers."""
    activation = scheme.activation
    if activation is None:
        return True
    plain = activation.element == "int8" and not activation.threshold and not scheme.columns
    return plain and scheme.spec.kind == "int" and activation.group % _UNIT == 0


def _whole_bytes(scheme: Scheme, blocks: int) -> bool:
    """Whether the numbers of every row of flat blocks start on a byte."""
    bits = [SCALE_TYPES[scheme.scale].bits, scheme.spec.bits if scheme.zero == "int" else 8]
    return all(blocks * size % 8 == 0 for size in bits)


def lies_as_read(planes: Mapping[str, Place], specs: Mapping[str, PlaneSpec], experts: int | None) -> bool:
    """Whether planes, stacked over experts or not, are what they should be, with rows that lie in one piece."""
    lead = () if experts is None else (experts,)
    for name, spec in specs.items():
        plane = planes.get(name)
        if plane is None or tuple(plane.shape) != (*lead, *spec.shape) or plane.dtype != spec.dtype:
            return False
        if plane.strides[-1] != 1 and plane.shape[-1] > 1:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def prepared(
    scheme: Scheme, n: int, k: int, experts: int | None, names: tuple[str, ...], places: tuple[Place, ...]
) -> tuple[bytes, Tensor] | None:
    """All of a `Product` that follows from the weight, and a tensor that it points to; None: not a weight for it.

    Remembered by everything that it depends on, since it takes as long as a small product.

    Args:
        scheme: how the weight is stored.
        n: its rows.
        k: its columns.
        experts: how many such weights the planes hold; None for one that is not stacked.
        names: of the planes.
        places: of each of them.
    """
    planes, specs = dict(zip(names, places, strict=True)), covered_planes(scheme, n, k)
    if specs is None or not lies_as_read(planes, specs, experts):
        return None
    element, codes, stacked, values = scheme.spec, planes["codes"], experts is not None, _values(scheme.spec)
    job = Product(codes=codes.address, rows=n, columns=k, block=scheme.block.columns or k, experts=experts or 1)
    job.codes_stride, job.codes_expert = codes.rows(stacked)
    job.kind, job.bits, job.low, job.zero = _kind(element), element.bits, element.low, _ZEROS[scheme.zero]
    job.values, job.picks = values.data_ptr(), 1
    fill_scales(job.scales, planes, scheme, n, k, stacked)
    fill_offsets(job.offsets, planes, scheme, n, k, stacked)
    if activation := scheme.activation:
        job.x_codes, job.x_group = _MADE_AT if activation.static else _MADE, activation.group or k
        job.x_scales = planes["input_scale"].address if activation.static else None
    return bytes(job), values


def _kind(element: Element) -> int:
    if element.float_dtype is not None:
        return _E4M3 if element.float_dtype is torch.float8_e4m3fn else _E5M2
    return _TABLE if element.kind == "table" else _INT


@functools.cache  # without end: what is known points there
def _values(element: Element) -> Tensor:
    """By code, float32; a table of fewer than 16 values again and again, as its fields are not masked."""
    if element.float_dtype is not None:
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(element.float_dtype).to(torch.float32)
    if element.kind == "table":
        values = torch.tensor(element.values, dtype=torch.float32, device="cpu")
    else:
        values = torch.arange(1 << element.bits, dtype=torch.float32, device="cpu") + element.low
    return values.repeat(max(1, _UNIT // len(values)))


def fill_input(job: Product, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """The rows of x `[rows, K]`, of y `[rows, n]`, contiguous, and the bias."""
    job.x, job.y, job.x_stride, job.y_stride = x.data_ptr(), y.data_ptr(), x.stride(0), job.rows
    job.x_type, job.dtype = DTYPES[x.dtype], DTYPES[y.dtype]
    fill_bias(job, bias)


def fill_bias(job: Product, bias: Tensor | None) -> None:
    """The bias, `[n]` or `[experts, n]`."""
    if bias is not None:
        job.addend, job.addend_type = bias.data_ptr(), DTYPES[bias.dtype]
        job.addend_expert = bias.stride(0) if bias.dim() > 1 else 0


def fill_codes(job: Product, codes: Tensor, scales: Tensor, y: Tensor) -> None:
    """Rows of codes of x, int8 `[rows, K]`, instead of x, and their scales `[rows, groups]`, or `[1]` of all of them.

    All are contiguous.
    """
    every = job.x_codes == _MADE_AT
    job.x, job.x_stride, job.x_codes = codes.data_ptr(), codes.stride(0), _GIVEN
    job.x_scales, job.x_scales_stride = scales.data_ptr(), 0 if every else scales.shape[-1]
    job.y, job.y_stride, job.dtype = y.data_ptr(), job.rows, DTYPES[y.dtype]


class Gated(ctypes.Structure):
    """One layer of experts with a gate. The fields of `Gated` in `matmul.h`, in that order."""

    held: tuple[Tensor, Tensor]
    """As for both products."""

    _fields_ = (
        ("first", Product),
        ("second", Product),
        ("weights", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("weights_type", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )
