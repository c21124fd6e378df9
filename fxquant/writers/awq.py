"""AWQ, as AutoAWQ writes its `gemm`: one group size for all linears."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Unit, Writer
from fxquant.checkpoints.awq import awq_obstacles, tensors_of_awq
from fxquant.checkpoints.target import group_of
from fxquant.scheme import Scheme
from fxquant.writers.nearest import alike, choose, integers, near_group
from fxquant.writers.settings import HEAD, check_left_out, left_out, require_quantized
from fxquant.writers.units import all_units

_BITS = 4
_SIZES = (128, 64, 32)
"""Groups that kernels know."""


def fit(matrices: Mapping[str, Matrix]) -> dict[str, Fit]:
    """All matrices in groups of one size.

    It is the size, among their own (-1 where all of them are whole rows) and 128, 64 and 32, under which most weights
    can be quantized at all, then most can be kept exactly, then fewest get coarser groups than they have; of those the
    largest. Larger groups that are multiples of it are kept exactly.

    The same scheme where it consists of integers of up to 4 bits with integer zero points or none in such groups,
    with fp16 scales. Else the same codes and blocks with fp16 scales, without quantized inputs, in the order of the
    columns; or else `int4` or `uint4`, see `fxquant.writers.nearest.integers`; what has more bits as well. In full
    precision: N that is no multiple of 8, K that is none of the group; and `lm_head`, as in all readers of the format.
    """
    linears = {key: (matrix.scheme, matrix.n, matrix.k) for key, matrix in matrices.items() if matrix.own != HEAD}
    fit_of = functools.cache(functools.partial(_fit, _common_size(Counter(linears.values()))))
    head = Fit(None, f"AWQ has {HEAD} in full precision")
    return {key: fit_of(*linears[key]) if key in linears else head for key in matrices}


def _fit(size: int, scheme: Scheme, n: int, k: int) -> Fit:
    others = itertools.chain(
        alike(scheme, ("fp16",)), integers(scheme, n, k, (_BITS,), "fp16", k if size == -1 else size)
    )
    return choose("AWQ", scheme, n, k, functools.partial(awq_obstacles, group_size=size), others)


def _common_size(linears: Mapping[tuple[Scheme, int, int], int]) -> int:
    """The group size for linears that there are so many of."""
    own = [(near_group(scheme, n, k, scheme.spec.bits <= _BITS), k) for scheme, n, k in linears]
    whole = (-1,) if all(size == k for size, k in own) else ()
    best: int = max({*_SIZES, *(size for size, _ in own), *whole}, key=lambda size: _merit(linears, size))
    return best


def _merit(linears: Mapping[tuple[Scheme, int, int], int], size: int) -> tuple[int, int, int, int]:
    held = exact = fine = 0
    for (scheme, n, k), count in linears.items():
        columns, weights = k if size == -1 else size, n * k * count
        held += weights * (k % columns == 0 and n % 8 == 0)
        exact += weights * (not awq_obstacles(scheme, n, k, group_size=size))
        whole_rows = scheme.spec.kind == "int" and scheme.spec.bits <= _BITS
        fine += weights * (columns <= near_group(scheme, n, k, whole_rows))
    return held, exact, fine, size if size > 0 else 1 << 30


def units(contents: Contents) -> Iterator[Unit]:
    """`qweight`, `qzeros` and `scales` of each matrix, and all other tensors.

    Raises:
        FileError: there is no quantized matrix.
    """
    return all_units(contents, functools.partial(tensors_of_awq, group_size=_size(contents)))


def config(contents: Contents) -> dict[str, Any]:
    """As AutoAWQ writes it.

    Raises:
        FileError: there is no quantized matrix, or a linear in full precision whose name is the end of that of a
            quantized one.
    """
    excluded = left_out(contents)
    check_left_out(contents, excluded)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _size(contents),
        "zero_point": True,  # in all layouts: of symmetric codes, it is 8
        "version": "gemm",
        "modules_to_not_convert": excluded or None,
    }


def _size(contents: Contents) -> int:
    """The largest group size that all matrices have; -1: all of K.

    Raises:
        FileError: there is no quantized matrix.
    """
    require_quantized(contents, "AWQ")
    groups = [(group_of(matrix.scheme, matrix.n, matrix.k) or 0, matrix.k) for matrix in contents.matrices.values()]
    return -1 if all(group == k for group, k in groups) else math.gcd(*(group for group, _ in groups))


WRITER_OF_AWQ = Writer(fit, units, config)
