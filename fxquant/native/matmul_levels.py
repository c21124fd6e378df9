"""How the compiled product reads the numbers of blocks: scales, zeros and biases, of one level or two."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.native.job import DTYPES
from fxquant.native.places import Place
from fxquant.scheme import DOUBLE_QUANT_BLOCK, SCALE_TYPES, Scheme, dynamic_values

_POWER, _SMALL_FLOAT, _TABLE, _INTEGER, NONE = 3, 4, 5, 6, 7


class Level(ctypes.Structure):
    """One number per block. The fields of `Level` in `matmul.h`, in that order."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("stored", "outer", "table", "offset")]
        + [(name, ctypes.c_int64) for name in ("stride", "expert", "outer_stride", "outer_expert", "offset_expert")]
        + [(name, ctypes.c_int64) for name in ("rows", "outer_rows", "per", "flat")]
        + [(name, ctypes.c_int32) for name in ("type", "bits", "flip", "outer_type")]
        + [(name, ctypes.c_float) for name in ("low", "step")]
    )


def fill_scales(level: Level, planes: Mapping[str, Place], scheme: Scheme, n: int, k: int, stacked: bool) -> None:
    """Scales, which may be double quantized."""
    _fill(level, planes["scales"], planes.get("scale_scales"), scheme, n, k, stacked)
    if scheme.double:
        outer, offset = planes["scale_scales"], planes["scale_offset"]
        level.outer, level.type, level.bits, level.table = outer.address, _TABLE, 8, _dynamic_map().data_ptr()
        level.outer_type, level.outer_rows = DTYPES[outer.dtype], n
        level.outer_stride, level.outer_expert = 0, outer.rows(stacked)[1]
        level.per = DOUBLE_QUANT_BLOCK
        level.stride = level.flat = k // scheme.block.columns
        level.offset, level.offset_expert = offset.address, offset.strides[0] if stacked else 0


def fill_offsets(level: Level, planes: Mapping[str, Place], scheme: Scheme, n: int, k: int, stacked: bool) -> None:
    """Zeros or biases, or nothing."""
    level.type = level.outer_type = NONE
    if scheme.zero == "bias":
        _fill(level, planes["biases"], planes.get("bias_scales"), scheme, n, k, stacked)
    elif scheme.zero == "float":
        _fill(level, planes["zeros"], None, scheme, n, k, stacked)
    elif scheme.zero == "int":
        spec = scheme.spec
        _place(level, planes["zeros"], spec.bits, scheme, n, k, stacked)
        level.type, level.flip = _INTEGER, 0x80 if spec.dtype is torch.int8 else 0
        level.low, level.step = float(spec.low), 1.0


def _fill(level: Level, stored: Place, outer: Place | None, scheme: Scheme, n: int, k: int, stacked: bool) -> None:
    kind = SCALE_TYPES[scheme.scale]
    _place(level, stored, kind.bits, scheme, n, k, stacked)
    level.outer_type = NONE
    if kind.dtype in DTYPES:
        level.type = DTYPES[kind.dtype]
    elif kind.kind == "power":
        level.type = _POWER
    elif kind.pattern is not None:
        level.type = _SMALL_FLOAT
    else:
        level.type, level.flip = _INTEGER, 0x80 if kind.dtype is torch.int8 else 0
        level.low, level.step = float(kind.low), float(kind.step)
    if scheme.outer is not None and outer is not None:
        large, columns = scheme.outer.block, scheme.block.columns or k
        level.outer, level.outer_type, level.outer_rows = outer.address, DTYPES[outer.dtype], large.rows or n
        level.outer_stride, level.outer_expert = outer.rows(stacked)
        level.per = (large.columns or max(k, columns)) // columns


def _place(level: Level, stored: Place, bits: int, scheme: Scheme, n: int, k: int, stacked: bool) -> None:
    level.stored, level.bits, level.per = stored.address, bits, 1
    level.rows, level.outer_rows = scheme.block.rows or n, n
    level.stride, level.expert = stored.rows(stacked)
    if scheme.block.flat:
        level.rows, level.stride = 1, k // scheme.block.columns * bits // 8


@functools.cache
def _dynamic_map() -> Tensor:
    # Kernels hold its address.
    return torch.tensor(dynamic_values(), dtype=torch.float32, device="cpu")
