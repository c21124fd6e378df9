"""A layer of experts with a gate, compiled: all of it in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

from fxquant.native.job import DTYPES
from fxquant.native.known import GATED_EXPERTS, remember
from fxquant.native.library import serves
from fxquant.native.matmul import job_of, largest_share, library_for, takes_ids
from fxquant.native.matmul_job import Gated, fill_input
from fxquant.scheme import Scheme

_MOST_SLOTS = 512
"""With more, what is between the products hardly counts, and takes room."""


def gated_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: tuple[Mapping[str, Tensor], Scheme],
    second: tuple[Mapping[str, Tensor], Scheme],
    inner: int,
    experts: int,
) -> Tensor | None:
    """`fxquant::gated_experts` for few tokens; between its steps, everything is float32.

    Args:
        x: `[T, K]`.
        ids: int64 `[T, k]`.
        weights: `[T, k]`.
        first: stacked planes, and the scheme, of gate and up, `[experts, 2 * inner, K]`.
        second: those of down, `[experts, K, inner]`.
        inner: how many features there are between both.
        experts: how many there are.

    Returns:
        `[T, K]` in the dtype of x. None where `fxquant.native.experts` gives None for one of the products, and for
        many ids.
    """
    k, slots = x.shape[-1], ids.numel()
    if (
        x.dim() != 2
        or not takes_ids(x, ids)
        or not 0 < slots <= _MOST_SLOTS
        or not experts
        or any(scheme.columns or (scheme.activation and scheme.activation.static) for _, scheme in (first, second))
    ):
        return None
    if weights.dtype not in DTYPES or weights.shape != ids.shape or not serves(first[0]["codes"], weights):
        return None
    one, two = job_of(*first, 2 * inner, k, experts, x, None), job_of(*second, k, inner, experts, x, None)
    built = None if one is None or two is None else library_for(first[1]) and library_for(second[1])
    if one is None or two is None or built is None:
        return None
    if largest_share(ids, experts) > built.fxquant_most_rows(DTYPES[x.dtype]):
        return None
    x, ids, weights, y = x.contiguous(), ids.contiguous(), weights.contiguous(), x.new_empty(x.shape)
    fill_input(one, x, y, None)
    one.slots, one.picks, one.ids = slots, ids.shape[1], ids.data_ptr()
    job = Gated(one, two, weights.data_ptr(), y.data_ptr(), DTYPES[weights.dtype], DTYPES[y.dtype])
    job.held = one.held, two.held
    built.fxquant_gated_experts(ctypes.byref(job))
    # No expert can have more rows than there are slots.
    most = min(_MOST_SLOTS, built.fxquant_most_rows(DTYPES[x.dtype]))
    remember(GATED_EXPERTS, built.fxquant_gated_experts_of, job, k, most)
    return y
