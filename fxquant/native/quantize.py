"""From float weights to planes, compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack
from fxquant.native.job import DTYPES, Job, covers, fill
from fxquant.native.library import library, serves
from fxquant.scheme import Scheme

_SEARCHES = ("absmax", "least_squares")


def quantize(weight: Tensor, scheme: Scheme, search: str, planes: Mapping[str, Tensor]) -> bool:
    """Fill in the planes of a weight, as `fxquant.codecs.quantize` does; or say that plain torch has to.

    With `absmax`, the same bits as plain torch. With `least_squares`, the same kind of search with more candidates:
    16 scales in geometric progression at once, each refitted in closed form, the best of them rounded and refitted
    again (and, where there are zeros, with the neighbouring ones); never a larger error than `absmax`.

    Args:
        weight: `[N, K]`, finite.
        scheme: how to store it.
        search: `absmax` or `least_squares`.
        planes: to write to, as `scheme.planes(N, K)` says.

    Returns:
        Whether that is done. False: another device or dtype, a tensor that is no plain one, too small to be worth it, a
        scheme that is not covered, or no compiler. The planes are untouched then.
    """
    n, k = weight.shape
    if search not in _SEARCHES or scheme.zero not in ("none", "int"):
        return False
    if not covers(scheme, n, k) or not _takes(weight, scheme, planes):
        return False
    built = library()
    if built is None:
        return False
    flat, zeros = scheme.block.flat, None
    job = Job(weight=weight.data_ptr(), dtype=DTYPES[weight.dtype], search=_SEARCHES.index(search))
    job.rows, job.columns, job.weight_stride = (1, n * k, n * k) if flat else (n, k, weight.stride(0))
    job.block = min(scheme.block.columns or k, job.columns)
    fill(job, scheme, planes)
    if scheme.zero == "int":
        zeros = torch.empty(scheme.block.grid(n, k), dtype=torch.uint8)
        job.zero_type, job.zeros = 1, zeros.data_ptr()
    built.fxquant_quantize(ctypes.byref(job))
    if zeros is not None:
        rows, dtype = zeros.view(-1, zeros.shape[-1]), scheme.spec.dtype
        planes["zeros"].copy_(pack(rows, scheme.spec.bits) if dtype is None else rows.view(dtype))
    if search == "absmax" and flat and n * k % scheme.block.columns and planes["scales"].is_floating_point():
        planes["scales"][-1:].clamp_(min=1e-38)  # as `fxquant.codecs.encode` has it
    return True


def _takes(weight: Tensor, scheme: Scheme, planes: Mapping[str, Tensor]) -> bool:
    """Whether the tensors lie in memory as the compiled function reads and writes them."""
    codes, scales = planes["codes"], planes["scales"]
    if not serves(weight, *planes.values()) or weight.dtype not in DTYPES or weight.stride(1) != 1:
        return False
    if not scheme.block.flat:
        return codes.stride(1) == 1 and scales.stride(1) == 1
    # Blocks that run on from row to row make one long row, where no row ends within a byte.
    whole = weight.shape[1] * scheme.spec.bits % 8 == 0
    return whole and all(t.is_contiguous() for t in (weight, codes, scales))
