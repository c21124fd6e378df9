"""Products that have been computed before, ready to be computed again: known by where their weights lie.

Weights that stream through the caches drop from them what the interpreter needs, so that each step in Python takes
several times as long as it seems to. What is here takes few of them, and none that Dynamo would look into.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.inductor import not_traced
from fxquant.native.job import DTYPES
from fxquant.native.library import smallest
from fxquant.native.matmul import job_of, library
from fxquant.native.matmul_job import Gated, Product, fill_bias
from fxquant.scheme import Scheme

_ADDRESS, _STRIDES = operator.methodcaller("data_ptr"), operator.methodcaller("stride")
_WHAT = operator.attrgetter("shape", "dtype")
_ANY_ROWS = 1 << 62


class Call:
    """All of a product but its input."""

    __slots__ = ("address", "columns", "count", "held", "most", "run", "weights")

    def __init__(self) -> None:
        self.run: Any = None
        """The compiled function, once it is known what to call it with."""
        self.held: Any = None
        """What the address belongs to, and what is pointed to there."""
        self.address = self.count = self.columns = self.most = self.weights = 0


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
    call = _call((*planes, *biases), scheme, x.dtype, k, tuple(rows), len(biases))
    if call.run is None or call.weights < smallest():
        return None
    count = x.numel() // k
    if not 0 < count <= call.most:
        return None
    y = x.new_empty((*x.shape[:-1], call.columns))
    call.run(call.address, call.count, x.data_ptr(), y.data_ptr(), count, torch.get_num_threads())
    return y


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
    given = [bias if bias.numel() else None for bias in biases] or [None] * len(parts)
    same = parsed.activation is not None or all(bias is None or bias.dtype == x.dtype for bias in given)
    if built is None or parsed.columns or not same or type(x) is not Tensor:
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
    call = _call((*planes, *biases), scheme, x.dtype, k, tuple(rows), len(biases))
    call.address, call.count, call.columns = ctypes.addressof(held), len(found), sum(rows)
    call.most = _ANY_ROWS if parsed.activation else built.fxquant_most_rows(DTYPES[x.dtype])
    call.weights = min(part["codes"].numel() for part in parts)
    call.held, call.run = (held, [job.held for job in found]), built.fxquant_linear


@not_traced
def gated_experts_again(
    x: Tensor, ids: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], *what: Any
) -> Tensor | None:
    """`fxquant::gated_experts` for a few tokens, where `remember_gated_experts` was told of it; else None."""
    if type(x) is not Tensor or ids.dtype is not torch.int64 or not (x.is_cpu and ids.is_cpu and weights.is_cpu):
        return None
    if not (x.is_contiguous() and ids.is_contiguous() and weights.is_contiguous() and ids.shape == weights.shape):
        return None
    call = _call((*first, *second), x.dtype, weights.dtype, x.dim(), x.shape[-1], ids.shape[-1], len(first), what)
    slots = ids.numel()
    # No expert can have more rows than there are slots.
    if call.run is None or call.weights < smallest() or not 0 < slots <= call.most or len(ids) != len(x):
        return None
    y = x.new_empty(x.shape)
    threads = torch.get_num_threads()
    call.run(call.address, x.data_ptr(), ids.data_ptr(), weights.data_ptr(), y.data_ptr(), slots, threads)
    return y


def remember_gated_experts(
    x: Tensor, ids: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], job: Gated, *what: Any
) -> None:
    """Let `gated_experts_again` do what a job has just done. `what`: all else that the op was told."""
    built = library()
    if built is None or type(x) is not Tensor:
        return
    call = _call((*first, *second), x.dtype, weights.dtype, x.dim(), x.shape[-1], ids.shape[-1], len(first), what)
    call.address, call.most = ctypes.addressof(job), built.fxquant_most_rows(DTYPES[x.dtype])
    call.weights = first[0].numel()
    call.held, call.run = job, built.fxquant_gated_experts_of
