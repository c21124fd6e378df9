"""From planes to float weights, compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

from fxquant.bits import unpack
from fxquant.native.job import DTYPES, Job, covers, fill
from fxquant.native.library import library, serves
from fxquant.scheme import Scheme

_ZEROS = {"none": 0, "int": 1, "float": 2, "bias": 0}


def dequantize(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, first: int, out: Tensor) -> bool:
    """Fill in rows of the weight that planes hold: the same bits that `fxquant.codecs.dequantize` gives in plain torch.

    Args:
        planes: as `scheme.planes(n, k)` says.
        scheme: what they were made under.
        n: rows of the whole weight.
        k: columns of the weight.
        first: number of the first row to write.
        out: `[rows, k]`, for the rows from there on.

    Returns:
        Whether that is done. False, and nothing is written, for the reasons that `fxquant.native.quantize` has.
    """
    if scheme.double or not covers(scheme, n, k) or not _takes(planes, scheme, n, k, first, out):
        return False
    built = library()
    if built is None:
        return False
    rows = slice(first, first + len(out))
    job = Job(weight=out.data_ptr(), rows=len(out), columns=k, weight_stride=out.stride(0), dtype=DTYPES[out.dtype])
    job.block, job.zero_type = scheme.block.columns or k, _ZEROS[scheme.zero]
    if scheme.block.flat:
        job.first = first
    # Blocks that run on from row to row are counted from the first row of the whole weight.
    at = {name: planes[name] if scheme.block.flat else planes[name][rows] for name in planes.keys() & _PER_BLOCK}
    fill(job, scheme, {**at, "codes": planes["codes"][rows]})
    zeros = at.get("zeros")
    if zeros is not None:
        if scheme.zero == "int" and scheme.spec.dtype is None:
            zeros = unpack(zeros, scheme.spec.bits, scheme.block.grid(n, k)[-1])
        zeros = zeros.contiguous() if scheme.zero == "int" else zeros
        job.zeros = zeros.data_ptr()
    if "biases" in at:
        job.biases = at["biases"].data_ptr()
    built.fxquant_dequantize(ctypes.byref(job))
    return True


_PER_BLOCK = {"scales", "zeros", "biases"}


def _takes(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, first: int, out: Tensor) -> bool:
    """Whether the planes are what they should be, and lie in memory as the compiled function reads them."""
    specs = {name: spec for name, spec in scheme.planes(n, k).items() if name in ("codes", *_PER_BLOCK)}
    if not specs.keys() <= planes.keys() or not 0 <= first <= first + len(out) <= n or out.dtype not in DTYPES:
        return False
    used = {name: planes[name] for name in specs}
    if not serves(out, *used.values()) or out.shape[1] != k or out.stride(1) != 1:
        return False
    if any((tuple(used[name].shape), used[name].dtype) != (spec.shape, spec.dtype) for name, spec in specs.items()):
        return False
    floats = [used[name] for name in used if name == "biases" or (name == "zeros" and scheme.zero == "float")]
    if any(plane.stride() != used["scales"].stride() for plane in floats):
        return False
    contiguous = all(plane.is_contiguous() for plane in used.values())
    return contiguous if scheme.block.flat else used["codes"].stride(1) == used["scales"].stride(1) == 1
