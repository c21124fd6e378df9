"""Which scheme of a format a weight gets whose own the format does not have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from fxquant.checkpoint_contents import Fit
from fxquant.checkpoints.target import Obstacles, group_of
from fxquant.scheme import ROW, Block, Scheme

SMALLEST_GROUP, COARSEST_GROUP = 16, 128
_LEAST_BITS = 4
"""Of integers that stand for anything but integers: three bits hold no table of eight values well."""


def choose(label: str, scheme: Scheme, n: int, k: int, obstacles: Obstacles, others: Iterable[Scheme]) -> Fit:
    """The scheme itself where nothing is against it, or the first of the others; or full precision.

    Args:
        label: what to call the format.
        scheme: of the weight.
        n: output features.
        k: input features.
        obstacles: what is against a scheme, of the format.
        others: in the order in which they are to be tried.
    """
    against = obstacles(scheme, n, k)
    if not against:
        return Fit(scheme)
    found = next((other for other in others if other.misfit(n, k) is None and not obstacles(other, n, k)), None)
    return Fit(found, f"{label} has {'; '.join(against)}")


def alike(scheme: Scheme, scales: Iterable[str]) -> Iterator[Scheme]:
    """The same codes in the same blocks.

    Without what is done to columns, with scales of another type, without quantized inputs: as much of it as before
    where that is possible, and in this order of importance.

    Args:
        scheme: of the weight.
        scales: types that they may have, the best first.
    """
    fixed = scheme.double or scheme.outer is not None
    types = dict.fromkeys((scheme.scale, *(() if fixed else scales)))
    columns, inputs = dict.fromkeys((scheme.columns, ())), dict.fromkeys((scheme.activation, None))
    for kept, scale, activation in itertools.product(columns, types, inputs):
        yield replace(scheme, columns=kept, scale=scale, activation=activation)


def integers(
    scheme: Scheme, n: int, k: int, bits: tuple[int, ...], scale: str, group: int | None = None
) -> Iterator[Scheme]:
    """Integers that come near to a scheme, with its inputs and without.

    They have the bits of its codes, at least 4 where those are no plain integers, or the next larger number of bits
    that there is, or else the largest. Groups are its own; where those are no equal parts of a row, or the row is one
    group of codes below 8 bits that were no integers or had more bits, the largest power of two from 16 to 128 within
    them that divides K. Plain symmetric integers stay symmetric, and 8 bits for others are so; all else gets zero
    points.

    Args:
        scheme: of the weight.
        n: output features.
        k: input features.
        bits: how many a code can have.
        scale: type of the scales.
        group: columns that share a scale; None: as said above.
    """
    spec = scheme.spec
    plain = spec.kind == "int" and not spec.levels
    wanted = spec.bits if plain else max(_LEAST_BITS, math.ceil(code_bits(scheme)))
    width = next((size for size in sorted(bits) if size >= wanted), max(bits))
    symmetric = scheme.zero == "none" and (spec.kind == "int" or width == 8)
    size = group or near_group(scheme, n, k, (plain and spec.bits <= width) or width == 8)
    for activation in dict.fromkeys((scheme.activation, None)):
        yield Scheme(
            f"{'' if symmetric else 'u'}int{width}",
            ROW if size == k else Block(1, size),
            scale,
            "none" if symmetric else "int",
            activation=activation,
        )


def near_group(scheme: Scheme, n: int, k: int, whole_rows: bool) -> int:
    """Columns of a group, see `integers`; K: there is no smaller one."""
    own = group_of(scheme, n, k)
    if own is not None and (own < k or whole_rows):
        return own
    columns = scheme.block.columns or COARSEST_GROUP
    sizes = (1 << power for power in range(COARSEST_GROUP.bit_length() - 1, 0, -1))
    return next((size for size in sizes if SMALLEST_GROUP <= size <= columns and k % size == 0), k)


def code_bits(scheme: Scheme) -> float:
    """Bits of codes and signs for one weight."""
    vectors = scheme.spec.vectors
    if vectors is None:
        return scheme.spec.bits
    return scheme.spec.bits / (vectors.rows * vectors.columns) + vectors.signs / 8
