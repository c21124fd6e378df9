"""Products that have been computed before, ready to be computed again: known by where their weights lie.

Weights that stream through the caches drop from them what the interpreter needs, so that each step in Python takes
several times as long as it seems to. What is here takes few of them, and none that Dynamo would look into.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxquant.inductor import is_observed, not_traced
from fxquant.native.job import DTYPES
from fxquant.native.library import smallest
from fxquant.native.matmul import job_of, library
from fxquant.native.matmul_job import Gated, Product, fill_bias
from fxquant.scheme import Scheme

_ADDRESS, _STRIDES = operator.methodcaller("data_ptr"), operator.methodcaller("stride")
_WHAT = operator.attrgetter("shape", "dtype")
_ANY_ROWS = 1 << 62


class Known(NamedTuple):
    """All of a product but its input."""

    run: Any
    """The compiled function."""
    address: int
    """Of its first argument."""
    held: Any
    """What lies there, and what is pointed to from there."""
    weights: int
    """Numbers of codes; of several weights, those of the one with the fewest."""
    most: int
    """Rows of the input, or slots."""
    products: int = 1
    columns: int = 0
    """Of the result."""


class Call:
    """What is known of one product, once it is: in one piece, so that threads see all of it or nothing."""

    __slots__ = ("known",)
    known: Known | None

    def __init__(self) -> None:
        self.known = None


@functools.lru_cache(maxsize=8192)
def _call_of(*_: Any) -> Call:
    """The one call of these arguments."""
    return Call()


@not_traced
def _call(tensors: Sequence[Tensor], *what: Any) -> Call:
    """The one call of these tensors, as they lie now, and of all else that it depends on."""
    places = tuple(map(_ADDRESS, tensors)), tuple(map(_STRIDES, tensors)), tuple(map(_WHAT, tensors))
    return _call_of(what, places, tuple(map(type, tensors)))


@not_traced
def linear_again(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor | None:
    """`fxquant::linear`, where `remember_linear` was told of it; else None."""
    if type(x) is not Tensor or not x.is_cpu or not x.is_contiguous():
        return None
    k = x.shape[-1]
    known = _call((*planes, *biases), scheme, x.dtype, k, tuple(rows), len(biases)).known
    if known is None or known.weights < smallest():
        return None
    count = x.numel() // k
    if not 0 < count <= known.most:
        return None
    y = x.new_empty((*x.shape[:-1], known.columns))
    known.run(known.address, known.products, x.data_ptr(), y.data_ptr(), count, torch.get_num_threads())
    return y


@not_traced
def linear_in_graph(
    x: Tensor, planes: Sequence[Tensor], biases: Sequence[Tensor], scheme: str, rows: Sequence[int], abi: int
) -> Tensor:
    """`fxquant::linear_forward`, as compiled graphs call it: without the dispatcher, unless somebody listens to it."""
    found = None if is_observed() else linear_again(x, planes, biases, scheme, rows, abi)
    return torch.ops.fxquant.linear_forward(x, planes, biases, scheme, rows, abi) if found is None else found


def remember_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    biases: Sequence[Tensor],
    scheme: str,
    rows: Sequence[int],
    parts: Sequence[Mapping[str, Tensor]],
) -> None:
    """Let `linear_again` compute products with these planes, which `fxquant.native.linear` has just computed.

    Args:
        x: as there, and as the next.
        planes: as the op has them.
        biases: likewise.
        scheme: likewise.
        rows: likewise.
        parts: the planes of each weight by name.
    """
    built, parsed, k = library(), Scheme.parse(scheme), x.shape[-1]
    call = _call((*planes, *biases), scheme, x.dtype, k, tuple(rows), len(biases))
    given = [bias if bias.numel() else None for bias in biases] or [None] * len(parts)
    same = parsed.activation is not None or all(bias is None or bias.dtype == x.dtype for bias in given)
    if call.known or built is None or parsed.columns or not same or type(x) is not Tensor:
        return
    jobs = [job_of(p, parsed, n, k, None, x, bias) for p, n, bias in zip(parts, rows, given, strict=True)]
    found = [job for job in jobs if job is not None]
    if len(found) < len(jobs):
        return
    held = (Product * len(found))()
    for i, (job, bias) in enumerate(zip(found, given, strict=True)):
        job.x_type = job.dtype = DTYPES[x.dtype]
        job.x_stride, job.y_stride = k, sum(rows)
        fill_bias(job, bias)
        held[i] = job
    most = _ANY_ROWS if parsed.activation else built.fxquant_most_rows(DTYPES[x.dtype])
    fewest = min(part["codes"].numel() for part in parts)
    pointed_to = held, [job.held for job in found]
    address = ctypes.addressof(held)
    call.known = Known(built.fxquant_linear, address, pointed_to, fewest, most, len(found), sum(rows))


@not_traced
def gated_experts_again(
    x: Tensor, ids: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], *what: Any
) -> Tensor | None:
    """`fxquant::gated_experts` for a few tokens, where `remember_gated_experts` was told of it; else None."""
    if type(x) is not Tensor or ids.dtype is not torch.int64 or not (x.is_cpu and ids.is_cpu and weights.is_cpu):
        return None
    if x.dim() != 2 or ids.dim() != 2:
        return None
    if not (x.is_contiguous() and ids.is_contiguous() and weights.is_contiguous() and ids.shape == weights.shape):
        return None
    whole = x.dtype, weights.dtype, x.shape[-1], ids.shape[-1], len(first), what
    known = _call((*first, *second), *whole).known
    slots = ids.numel()
    # No expert can have more rows than there are slots.
    if known is None or known.weights < smallest() or not 0 < slots <= known.most or len(ids) != len(x):
        return None
    y = x.new_empty(x.shape)
    threads = torch.get_num_threads()
    known.run(known.address, x.data_ptr(), ids.data_ptr(), weights.data_ptr(), y.data_ptr(), slots, threads)
    return y


@not_traced
def gated_experts_in_graph(*args: Any) -> Tensor:
    """`fxquant::gated_experts`, as compiled graphs call it."""
    found = None if is_observed() else gated_experts_again(*args)
    return torch.ops.fxquant.gated_experts(*args) if found is None else found


def remember_gated_experts(
    x: Tensor, ids: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], job: Gated, *what: Any
) -> None:
    """Let `gated_experts_again` do what a job has just done. `what`: all else that the op was told."""
    built = library()
    if built is None or type(x) is not Tensor:
        return
    whole = x.dtype, weights.dtype, x.shape[-1], ids.shape[-1], len(first), what
    call = _call((*first, *second), *whole)
    if call.known is None:
        run, most = built.fxquant_gated_experts_of, built.fxquant_most_rows(DTYPES[x.dtype])
        call.known = Known(run, ctypes.addressof(job), job, first[0].numel(), most)
