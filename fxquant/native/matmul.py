"""Products with planes, compiled: codes are decoded where they are multiplied."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.native import known
from fxquant.native.dequantize import dequantize
from fxquant.native.job import DTYPES
from fxquant.native.library import load, serves
from fxquant.native.matmul_job import Product, covered_planes, fill_bias, fill_codes, fill_input, prepared
from fxquant.native.places import Place
from fxquant.scheme import Scheme

_SHARED = ("vectors.h", "bits.h", "matmul.h", "matmul_levels.h", "matmul_units.h", "matmul_task.h", "matmul_tasks.h")
_KERNELS = (
    *_SHARED,
    *("matmul_inputs.h", "matmul_panels.h", "matmul_strips.h", "matmul_codes.h"),
    *("matmul_codes_single.h", "matmul_strips_digits.h"),
    *("matmul_pairs.h", "matmul_words_floats.h", "matmul_words_codes.h", "matmul_turns.h", "matmul_words.h"),
    *("matmul_strips_floats.h", "matmul_tiles.h"),
    *("amx.h", "matmul_amx_floats.h", "matmul_amx_codes.h", "matmul_amx.h", "matmul_parts.h"),
)
_PARTS = {
    "strips": (*_KERNELS, "matmul_strips.cpp"),
    "general": (*_SHARED, "matmul_kernels.h", "matmul_parts.h", "matmul_general.cpp"),
    "words": (*_KERNELS, "matmul_words.cpp"),
    "codes": (*_KERNELS, "matmul_codes.cpp"),
    "tiled": (*_KERNELS, "matmul_amx.cpp"),
}
"""Libraries of kernels, each with a function `fxquant_give_<name>`. What takes longest to compile comes first."""
_MAIN = (*_KERNELS, "matmul.cpp", "gated.cpp")
_FEW_IDS = 16
"""So many rows are never too many."""


def linear(x: Tensor, planes: Mapping[str, Tensor], scheme: Scheme, n: int, bias: Tensor | None) -> Tensor | None:
    """`x @ W.T + bias` for the weight that planes hold, where that is faster than to decode all of it first.

    W is not rounded to the dtype of x, but for the case below: it is in float32, up to rounding what
    `fxquant.codecs.dequantize` gives. Sums are in float32, rounded once; where there are zeros, products with codes and
    with zeros may be rounded apart. Where x is quantized, or is bfloat16 or float16, products with integers are added
    up as integers, exactly, over up to 128 columns under one scale, on processors with AVX512-VNNI; those of floats
    with more than 2 rows only if 32 columns or more have one scale, and with integers of 8 bits from 5 rows on, of 5
    or 6 from 64, of 2 or 3 from 128. Floats are whole numbers of 24 bits there, off by about 2**-23 of the largest of
    those columns: in bfloat16 none is that is not 2**14 times smaller than it, in float16 2**11 times.

    On processors with matrix units (AMX) more than 8 rows are multiplied there; more than 6 of bfloat16 with integers
    of 4 bits, and more than 4 with other values of 4 bits, or with any of 2, 3, 5 or 6 bits or float8: in pieces that
    are bfloat16, whose products are exact. Integers and small floats are one piece; values of other tables (nf4) count
    with 8 bits where x is bfloat16, with 16 where it is float16, and float32 with them is left to other kernels. With
    more than 32 rows of bfloat16, weights of up to 4 bits in blocks are rounded to bfloat16 with their scales.

    On processors with AVX512-BF16 and no such units, or none that the system lets a process use, rows of bfloat16
    are multiplied by pairs of columns, exactly, and added up in float32; but from 5 to 24 rows as whole numbers, as
    above, with integers of 8 bits of which 32 columns or more have one scale, and up to 4 rows in float32 where
    blocks of 64 columns, or 128 of 4 bits, do not end with those of the weight. Values of other tables count with 8
    bits there, too. With more than 32 rows, weights of 4 bits are rounded to bfloat16 with their scales where
    blocks are no multiples of 64 columns, or with zeros or biases of 128; so are others, but integers of 8 bits, where
    they are no multiples of half as many.

    Nothing depends on the number of threads. Each row of the result depends on its own alone where x is quantized;
    where it is not, all calls with few rows agree on every bit of a row, and so do all with more: few are up to 2 for
    those integers of 4 bits, 4 for those of 8 bits, and 15 or more otherwise. So do all calls by matrix units, up to 32
    rows and from 33 on, and all by pairs with few rows, up to 4 with values of 4 bits, 6 with those of fewer and 8
    with others, and all with more, up to 32 rows and from 33 on. Without either, and with many rows of a dtype that the
    processor has no instructions for, W is decoded as a whole, and the product is torch's, in float32.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        planes: as `scheme.planes(n, K)` says.
        scheme: what they were made under.
        n: rows of the weight.
        bias: `[n]` in any of these dtypes, or None.

    Returns:
        `[..., n]` in the dtype of x. None where plain torch has to, or does it faster: another device or dtype, a
        tensor that is no plain one, a weight too small, a scheme that is not covered, many rows in a dtype that the
        processor has instructions for, or no compiler.
    """
    k = x.shape[-1]
    rows = x.numel() // max(k, 1)
    job = job_of(planes, scheme, n, k, None, x, bias)
    built = None if job is None else library_for(scheme)
    if job is None or built is None:
        return None
    if not scheme.activation and rows > built.fxquant_most_rows(DTYPES[x.dtype]):
        if built.fxquant_multiplies(DTYPES[x.dtype]):
            return None
        decoded = x.new_empty((n, k), dtype=torch.float32)
        if not scheme.columns and dequantize(planes, scheme, n, k, 0, decoded):
            return F.linear(x.float(), decoded, None if bias is None else bias.float()).to(x.dtype)
    y = x.new_empty((*x.shape[:-1], n))
    if rows:
        job.slots = rows
        _run(built, job, x.reshape(rows, k), planes, y, bias)
    return y


def linear_on_codes(
    codes: Tensor,
    scales: Tensor,
    planes: Mapping[str, Tensor],
    scheme: Scheme,
    n: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """`linear` of an x that is quantized already, into the same bits.

    Args:
        codes: int8 `[..., K]`.
        scales: float32 `[..., groups]`, or `[1]` of static activations.
        planes: as there.
        scheme: as there; it has the activation that made the codes.
        n: as there.
        bias: as there.
        dtype: of the result.
    """
    k = codes.shape[-1]
    y = codes.new_empty((*codes.shape[:-1], n), dtype=dtype)
    job = job_of(planes, scheme, n, k, None, y, bias) if serves(planes["codes"], codes, scales) else None
    built = None if job is None else library_for(scheme)
    if job is None or built is None:
        return None
    rows = codes.reshape(-1, k).contiguous()
    scales = scales.contiguous()
    job.slots = len(rows)
    fill_codes(job, rows, scales, y)
    fill_bias(job, bias)
    if job.slots:
        built.fxquant_multiply(ctypes.byref(job))
    return y


def experts(
    x: Tensor, ids: Tensor, planes: Mapping[str, Tensor], scheme: Scheme, n: int, bias: Tensor | None
) -> Tensor | None:
    """`x @ W[id].T + bias[id]` for every id of every token, as `linear` does it; experts without tokens are not read.

    Args:
        x: `[T, K]`, or `[T, k, K]` with a row for every id.
        ids: int64 `[T, k]`.
        planes: as `scheme.planes(n, K)` says, with a leading dimension of experts.
        scheme: what they were made under.
        n: rows of every weight.
        bias: `[experts, n]` or None.

    Returns:
        `[T, k, n]` in the dtype of x, zeros where an id names no expert. None as for `linear`, and where one expert has
        many rows, of any dtype.
    """
    k, slots, count = x.shape[-1], ids.numel(), planes["codes"].shape[0]
    if not takes_ids(x, ids) or scheme.columns or (scheme.activation and scheme.activation.static):
        return None
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    job = job_of(planes, scheme, n, k, count, x, bias)
    built = None if job is None else library_for(scheme)
    if job is None or built is None:
        return None
    if not scheme.activation and largest_share(ids, count) > built.fxquant_most_rows(DTYPES[x.dtype]):
        return None
    y = x.new_zeros((*ids.shape, n))
    if slots and count:
        ids = ids.contiguous()
        job.slots, job.ids = slots, ids.data_ptr()
        job.picks = ids.shape[1] if x.shape[:-1] != ids.shape else 1
        _run(built, job, x.reshape(-1, k), planes, y, bias)
    return y


def takes_ids(x: Tensor, ids: Tensor) -> bool:
    """Whether ids `[T, k]` are plain numbers on a CPU, and x has a row for every token or id."""
    plain = type(ids) is Tensor and ids.device.type == "cpu" and ids.dtype == torch.int64
    return plain and x.shape[:-1] in (ids.shape, ids.shape[:1])


def largest_share(ids: Tensor, count: int) -> int:
    """How many ids name the expert that most of them name; a larger number is good enough while it is small."""
    if ids.numel() <= _FEW_IDS or not count:
        return ids.numel()
    known = ids[(ids >= 0) & (ids < count)]
    return int(known.bincount(minlength=count).max())


def job_of(
    planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, experts: int | None, x: Tensor, bias: Tensor | None
) -> Product | None:
    """A job for these planes and an x and a bias like these; None where the scheme or a tensor is not for it."""
    biases = () if bias is None else (bias,)
    if covered_planes(scheme, n, k) is None or x.dtype not in DTYPES:
        return None
    if not serves(planes["codes"], x, *planes.values(), *biases):
        return None
    shape = (n,) if experts is None else (experts, n)
    if any(b.dtype not in DTYPES or tuple(b.shape) != shape or b.stride(-1) != 1 for b in biases):
        return None
    places = tuple([Place.of(plane) for plane in planes.values()])
    found = prepared(scheme, n, k, experts, tuple(planes), places)
    if found is None:
        return None
    job = Product.from_buffer_copy(found[0])
    job.held, job.threads = found[1], torch.get_num_threads()
    return job


def _run(
    built: ctypes.CDLL, job: Product, x: Tensor, planes: Mapping[str, Tensor], y: Tensor, bias: Tensor | None
) -> None:
    """The product with rows of x `[rows, K]`, whose columns take the order of the planes', and their scales, first."""
    if "column_scales" in planes:
        x = x.to(torch.float32) * planes["column_scales"]
    if "perm" in planes:
        x = x.index_select(1, planes["perm"])
    x = x if x.stride(1) == 1 else x.contiguous()
    fill_input(job, x, y, bias)
    built.fxquant_multiply(ctypes.byref(job))


def library_for(scheme: Scheme) -> ctypes.CDLL | None:
    """The compiled product; None where it cannot be compiled, or the processor has no instructions for codes of x."""
    built = library()
    return None if built is None or (scheme.activation and not built.fxquant_multiplies_codes()) else built


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled product; None, after a warning, where it cannot be compiled or loaded."""
    instead = "weights are decoded as a whole for every product instead, many times slower"
    with ThreadPoolExecutor() as beside:
        beside.submit(known.library)
        libraries = load("product", instead, *_PARTS.values(), _MAIN, contract=True)
    if libraries is None:
        return None
    *parts, built = libraries
    built.fxquant_kernels.restype = ctypes.c_void_p
    for name, part in zip(_PARTS, parts, strict=True):
        give = getattr(part, f"fxquant_give_{name}")
        give.argtypes, give.restype = [ctypes.c_void_p], None
        give(built.fxquant_kernels())
    for function in (built.fxquant_multiply, built.fxquant_gated_experts):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    built.fxquant_most_rows.argtypes, built.fxquant_most_rows.restype = [ctypes.c_int], ctypes.c_int64
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    built.fxquant_linear.argtypes = [pointer, size, pointer, pointer, size, number]
    built.fxquant_gated_experts_of.argtypes = [*[pointer] * 5, size, number]
    built.fxquant_linear.restype = built.fxquant_gated_experts_of.restype = None
    built.fxquant_multiplies_codes.restype = built.fxquant_has_matrix_units.restype = ctypes.c_int
    built.fxquant_multiplies_pairs.restype = ctypes.c_int
    built.fxquant_multiplies.argtypes, built.fxquant_multiplies.restype = [ctypes.c_int], ctypes.c_int
    return built
