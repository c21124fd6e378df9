"""Scales (and biases) of two levels, compiled: GGUF's K-quants, nvfp4."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack
from fxquant.native.job import Job, covers_blocks, fill
from fxquant.scheme import SCALE_TYPES, ScaleType, Scheme

_VECTOR, _MOST = 16, 64


def covers_levels(scheme: Scheme, n: int, k: int) -> bool:
    """Whether the compiled functions know both levels: integers within a row, small floats in the whole weight."""
    block, outer, kind = scheme.block, scheme.outer, SCALE_TYPES[scheme.scale]
    if outer is None or not covers_blocks(scheme, n, k) or block.rows != 1 or block.columns % _VECTOR:
        return False
    if kind.pattern is torch.float8_e4m3fn:
        return scheme.zero == "none" and (outer.block.rows, outer.block.columns) == (0, 0)
    within = outer.block.rows == 1 and 0 < outer.block.columns <= _MOST * block.columns
    return kind.kind == "code" and scheme.zero in ("none", "bias") and within


def quantize_levels(built: ctypes.CDLL, job: Job, scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int) -> None:
    """Fill in the planes of a weight with scales of two levels. `job` says where the weight is."""
    assert scheme.outer is not None
    if SCALE_TYPES[scheme.scale].pattern is not None:
        fill(job, scheme, planes)
        job.search, job.scale_scales = job.search == 1, planes["scale_scales"].data_ptr()
        built.fxquant_quantize_globally(ctypes.byref(job))
        return
    kind, shape = SCALE_TYPES[scheme.scale], scheme.block.grid(n, k)
    names = ("scales", "biases") if scheme.zero == "bias" else ("scales",)
    fields = {name: torch.empty(shape, dtype=torch.uint8) for name in names}
    fill(job, scheme, {**planes, **fields})
    if "biases" in fields:
        job.biases, job.bias_scales = fields["biases"].data_ptr(), planes["bias_scales"].data_ptr()
    job.group, job.scale_scales = scheme.outer.block.columns, planes["scale_scales"].data_ptr()
    job.groups_stride = planes["scale_scales"].stride(0)
    job.code_low, job.code_step, job.code_last = kind.low, kind.step, (1 << kind.bits) - 1
    job.code_flip = 0x80 if kind.dtype is torch.int8 else 0
    built.fxquant_quantize_leveled(ctypes.byref(job))
    for name in names:
        planes[name].copy_(_packed(fields[name], kind))


def _packed(fields: Tensor, kind: ScaleType) -> Tensor:
    return fields.view(kind.dtype) if kind.dtype is not None else pack(fields, kind.bits)
