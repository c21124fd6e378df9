"""The stored table of tiles: which one multiplies, and into how many parts its columns are split.

`shapes.json` lies beside this file. `general` is for every GPU, by rows of the input: narrow tiles where rows are few,
so that a weight of 4096 rows still has 128 programs. `measured` is by the name of a GPU and the shape of a weight:
`tests/benchmarks/tune_tiles.py` writes it, where there is a GPU. It is empty as long as none has measured.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

_LEAST_STEPS = 4
"""A program of fewer steps costs more to start than it computes."""
_MOST_SPLITS = 8
"""Every part is written and read again, in float32."""


@dataclass(frozen=True)
class Tile:
    """What one program of the tiled kernel computes, and how."""

    rows: int
    """Of x, at least 16: what tensor cores take."""
    columns: int
    """Of the result: rows of the weight."""
    depth: int
    """The most columns of the weight that one step reads."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """A product that has been measured."""

    device: str
    """The name of the GPU, as torch gives it."""
    bits: int
    """Of a code."""
    n: int
    """Rows of the weight."""
    k: int
    """Its columns."""
    most: int
    """Rows of x up to which the tile was the best."""


@dataclass(frozen=True)
class Choice:
    """A tile, and into how many parts the columns of the weight are split; None: as `splits` says."""

    tile: Tile
    splits: int | None = None


@dataclass(frozen=True)
class Table:
    """What the file holds."""

    general: tuple[tuple[int, Tile], ...]
    """The most rows of x, and the tile for them."""
    measured: tuple[tuple[Shape, Choice], ...]


def choices(table: Table, device: str, bits: int, n: int, k: int, rows: int) -> tuple[Choice, ...]:
    """Every tile of the table, the one for this product first."""
    fitting = [
        (shape.most, choice)
        for shape, choice in table.measured
        if (shape.device, shape.bits, shape.n, shape.k) == (device, bits, n, k) and rows <= shape.most
    ]
    best = [choice for _, choice in sorted(fitting, key=lambda entry: entry[0])[:1]]
    # Where rows are more than any has, the one for most of them.
    by_rows = sorted(table.general, key=lambda entry: (rows > entry[0], entry[0] if rows <= entry[0] else -entry[0]))
    return tuple(dict.fromkeys([*best, *(Choice(tile) for _, tile in by_rows)]))


def splits(programs: int, steps: int, processors: int) -> int:
    """Into how many parts of equal length to split `steps`, so that at least three of four processors have a program.

    Args:
        programs: how many there are if nothing is split.
        steps: of each of them.
        processors: multiprocessors of the GPU.
    """
    parts = 1
    while 4 * parts * programs < 3 * processors and parts < _MOST_SPLITS and steps % (2 * parts * _LEAST_STEPS) == 0:
        parts *= 2
    return parts


@functools.cache
def stored() -> Table:
    """The table that comes with the package."""
    text = importlib.resources.files("fxquant.lowering").joinpath("shapes.json").read_text()
    return parse(json.loads(text))


def parse(data: Any) -> Table:
    """The table that JSON holds.

    Raises:
        TypeError: an entry has other keys than `Tile` and `Shape` have.
    """
    general = tuple((entry["most"], _tile(entry, {"most"})) for entry in data["general"])
    keys = set(Shape.__dataclass_fields__)
    measured = [
        (Shape(**{key: entry[key] for key in keys}), Choice(_tile(entry, keys | {"splits"}), entry["splits"]))
        for entry in data["measured"]
    ]
    return Table(general, tuple(measured))


def _tile(entry: dict[str, Any], others: set[str]) -> Tile:
    return Tile(**{key: value for key, value in entry.items() if key not in others})
