"""What is told of a product that has just been computed, so that the next one like it starts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxquant.native.job import DTYPES
from fxquant.native.known import LINEAR, remember
from fxquant.native.matmul import job_of, library
from fxquant.native.matmul_job import Product, fill_bias
from fxquant.scheme import Scheme

_ANY_ROWS = 1 << 62


def remember_linear(
    x: Tensor, biases: Sequence[Tensor], scheme: Scheme, rows: Sequence[int], parts: Sequence[Mapping[str, Tensor]]
) -> None:
    """Remember what `fxquant.native.linear` has just computed for every weight of one call of `fxquant::linear`.

    Args:
        x: as there.
        biases: as there.
        scheme: of all weights.
        rows: N of every weight.
        parts: the planes of each weight by name.
    """
    built, k = library(), x.shape[-1]
    given = [bias if bias.numel() else None for bias in biases] or [None] * len(parts)
    same = scheme.activation is not None or all(bias is None or bias.dtype == x.dtype for bias in given)
    if built is None or scheme.columns or not same:
        return
    jobs = [job_of(p, scheme, n, k, None, x, bias) for p, n, bias in zip(parts, rows, given, strict=True)]
    held = (Product * len(jobs))()
    for i, (job, bias) in enumerate(zip(jobs, given, strict=True)):
        if job is None:
            return
        job.x_type = job.dtype = DTYPES[x.dtype]
        job.x_stride, job.y_stride = k, sum(rows)
        fill_bias(job, bias)
        held[i] = job
    most = _ANY_ROWS if scheme.activation else built.fxquant_most_rows(DTYPES[x.dtype])
    remember(LINEAR, built.fxquant_linear, held, sum(rows), most)
