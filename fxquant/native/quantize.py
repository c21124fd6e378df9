"""From float weights to planes, compiled."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxquant.bits import pack
from fxquant.native.double import Double, quantize_double
from fxquant.native.job import DTYPES, Job, covers, fill, fill_offsets
from fxquant.native.levels import covers_levels, quantize_levels
from fxquant.native.library import library, serves
from fxquant.scheme import Scheme

_SEARCHES = {"absmax": 0, "least_squares": 1, "minmax": 2}


def quantize(
    weight: Tensor,
    scheme: Scheme,
    search: str,
    planes: Mapping[str, Tensor],
    double: Callable[[Tensor], Double] | None = None,
) -> bool:
    """Fill in the planes of a weight, as `fxquant.codecs.quantize` does; or say that plain torch has to.

    With `absmax` and `minmax`, the same bits as plain torch. With `least_squares`, the same kind of search with more
    candidates: 16 scales (or scales and biases) at once, each refitted in closed form, the best of them rounded and
    refitted again, with the neighbouring zeros or biases where there are any; never a larger error than `absmax`.

    Args:
        weight: `[N, K]`, finite.
        scheme: how to store it.
        search: `absmax`, `minmax` or `least_squares`.
        planes: to write to, as `scheme.planes(N, K)` says.
        double: gives the second level of a vector of float32 scales, for schemes with double quantization.

    Returns:
        Whether that is done. False: another device or dtype, a tensor that is no plain one, too small to be worth it, a
        scheme that is not covered, or no compiler. The planes are untouched then.
    """
    n, k = weight.shape
    leveled = covers_levels(scheme, n, k)
    if search not in _SEARCHES or not (leveled or covers(scheme, n, k)) or not _takes(weight, scheme, planes):
        return False
    if scheme.double and double is None:
        return False
    built = library()
    if built is None:
        return False
    job = Job(weight=weight.data_ptr(), dtype=DTYPES[weight.dtype], search=_SEARCHES[search])
    job.rows, job.columns, job.weight_stride = (n, k, weight.stride(0)) if not scheme.block.flat else (1, n * k, n * k)
    job.block = min(scheme.block.columns or k, job.columns)
    if leveled:
        quantize_levels(built, job, scheme, planes, n, k)
        return True
    fill(job, scheme, planes)
    if scheme.zero in ("float", "bias"):
        fill_offsets(job, scheme, planes)
        built.fxquant_quantize_offsets(ctypes.byref(job))
        return True
    # Ranges include 0 here, so that `minmax` is `absmax`.
    job.search = search == "least_squares"
    run = functools.partial(_one_level, built, job, scheme, planes.get("zeros"), n * k)
    if double is not None and scheme.double:
        quantize_double(job, planes, double, run)
    else:
        run(planes["scales"])
    return True


def _one_level(
    built: ctypes.CDLL, job: Job, scheme: Scheme, zeros: Tensor | None, weights: int, scales: Tensor
) -> None:
    """Scales, and integer zeros or none."""
    flat, dtype, found = scheme.block.flat, scheme.spec.dtype, None
    if zeros is not None:
        found = torch.empty((job.rows, -(-job.columns // job.block)), dtype=torch.uint8)
        job.zero_type, job.zeros = 1, found.data_ptr()
    built.fxquant_quantize(ctypes.byref(job))
    if zeros is not None and found is not None:
        zeros.copy_((pack(found, scheme.spec.bits) if dtype is None else found.view(dtype)).view(zeros.shape))
    if not job.search and flat and weights % scheme.block.columns and scales.is_floating_point():
        scales[-1:].clamp_(min=1e-38)  # as `fxquant.codecs.encode` has it


def _takes(weight: Tensor, scheme: Scheme, planes: Mapping[str, Tensor]) -> bool:
    """Whether the tensors lie in memory as the compiled functions read and write them."""
    codes, scales = planes["codes"], planes["scales"]
    if not serves(weight, *planes.values()) or weight.dtype not in DTYPES or weight.stride(1) != 1:
        return False
    if scheme.block.flat:
        # Blocks that run on from row to row make one long row, where no row ends within a byte.
        whole = weight.shape[1] * scheme.spec.bits % 8 == 0
        return whole and all(t.is_contiguous() for t in (weight, *planes.values()))
    alike = [("zeros", "scales")] if scheme.zero == "float" else [("biases", "scales")] if not scheme.outer else []
    alike.append(("bias_scales", "scale_scales"))
    if any(one in planes and planes[one].stride() != planes[other].stride() for one, other in alike):
        return False
    return codes.stride(1) == 1 and scales.stride(1) == 1
