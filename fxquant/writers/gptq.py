"""GPTQ, as GPTQModel writes its `gptq_v2`."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Unit, Writer
from fxquant.checkpoints.gptq import WRITTEN_BITS, gptq_obstacles, tensors_of_gptq
from fxquant.checkpoints.integer_parts import held_bits
from fxquant.checkpoints.target import group_of
from fxquant.scheme import Scheme
from fxquant.writers.nearest import alike, choose, integers
from fxquant.writers.settings import HEAD, WRITER, left_out, require_quantized, shared
from fxquant.writers.units import all_units


class _Settings(NamedTuple):
    bits: int
    group_size: int
    sym: bool


def fit(matrices: Mapping[str, Matrix]) -> dict[str, Fit]:
    """Each matrix by itself.

    The same scheme where it consists of integers of up to 8 bits with integer zero points or none, in groups that
    are equal parts of a row, with fp16 scales; columns may be permuted. Else the same codes and blocks with fp16
    scales, without quantized inputs; or else integers of 2, 3, 4 or 8 bits, see `fxquant.writers.nearest.integers`.
    In full precision: N or K that are no multiples of 32.
    """
    fit_of = functools.cache(_fit)
    return {key: fit_of(matrix.scheme, matrix.n, matrix.k) for key, matrix in matrices.items()}


def _fit(scheme: Scheme, n: int, k: int) -> Fit:
    others = itertools.chain(alike(scheme, ("fp16",)), integers(scheme, n, k, WRITTEN_BITS, "fp16"))
    return choose("GPTQ", scheme, n, k, gptq_obstacles, others)


def units(contents: Contents) -> Iterator[Unit]:
    """`qweight`, `qzeros`, `scales` and `g_idx` of each matrix, and all other tensors.

    Raises:
        FileError: there is no quantized matrix.
    """
    require_quantized(contents, "GPTQ")
    return all_units(contents, tensors_of_gptq)


def config(contents: Contents) -> dict[str, Any]:
    """The most common settings, and `dynamic` for modules that have others, or are in full precision.

    Raises:
        FileError: there is no quantized matrix.
    """
    require_quantized(contents, "GPTQ")
    settings = shared({name: _options(matrix) for name, matrix in contents.matrices.items()})
    common, *others = settings
    dynamic: dict[str, dict[str, Any]] = {}
    for other in others:
        overrides = {key: value for key, value in other._asdict().items() if value != getattr(common, key)}
        dynamic |= {f"+:^{re.escape(name)}$": overrides for name in settings[other]}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in left_out(contents) if name != HEAD}
    return {
        "quant_method": "gptq",
        **common._asdict(),
        "desc_act": any("perm" in matrix.scheme.columns for matrix in contents.matrices.values()),
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": any(matrix.own == HEAD for matrix in contents.matrices.values()),
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [WRITER]},
    }


def _options(matrix: Matrix) -> list[_Settings]:
    bits = held_bits(matrix.scheme.spec, WRITTEN_BITS)
    group = group_of(matrix.scheme, matrix.n, matrix.k)
    assert group is not None
    sizes = (group,) if group < matrix.k else (-1, group) if matrix.scheme.block.columns == 0 else (group, -1)
    return [_Settings(bits, size, matrix.scheme.zero == "none") for size in sizes]


WRITER_OF_GPTQ = Writer(fit, units, config)
