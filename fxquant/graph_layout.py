"""Where to draw the boxes of a graph: layers from top to bottom, few crossings, short lines. Geometry alone.

The method is that of Sugiyama, Tagawa and Toda (1981): layers by longest path, long edges cut by invisible boxes, order
within a layer by the barycentre of the neighbours, then positions; positions are a least squares fit to the
neighbours under the order (isotonic regression).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_Edge = tuple[int, int]
_Point = tuple[float, float]
_SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """Positions in pixels; y grows downwards."""

    centres: tuple[_Point, ...]
    """Centre of each box."""
    routes: Mapping[_Edge, tuple[_Point, ...]]
    """For each edge the points that it passes: where it leaves a box, where it passes between others, where it ends."""
    width: float
    height: float


def layered(sizes: Sequence[tuple[float, float]], edges: Sequence[_Edge], gap: float = 22, rise: float = 30) -> Layout:
    """Lay out an acyclic graph.

    Args:
        sizes: width and height of each box.
        edges: pairs of indices into `sizes`, from above to below.
        gap: least distance of neighbours in a layer.
        rise: distance of layers.
    """
    layer = _layers(len(sizes), edges)
    widths = [w for w, _ in sizes]
    chains: dict[_Edge, list[int]] = {}
    for a, b in dict.fromkeys(edges):
        dummies = list(range(len(widths), len(widths) + layer[b] - layer[a] - 1))
        widths += [0.0] * len(dummies)
        layer += range(layer[a] + 1, layer[b])
        chains[a, b] = [a, *dummies, b]
    links = [link for chain in chains.values() for link in itertools.pairwise(chain)]
    rows = _ordered(layer, links)
    x = _positions(rows, widths, links, gap)
    for chain in chains.values():
        _straighten(chain[1:-1], x, rows, layer, widths, gap)
    tops, heights = _row_heights(rows, sizes, rise)
    centres = tuple((x[i], tops[layer[i]] + heights[layer[i]] / 2) for i in range(len(sizes)))
    routes: dict[_Edge, tuple[_Point, ...]] = {}
    for edge, chain in chains.items():
        points = [(x[chain[0]], centres[edge[0]][1] + sizes[edge[0]][1] / 2)]
        for dummy in chain[1:-1]:
            top = tops[layer[dummy]]
            points += [(x[dummy], top), (x[dummy], top + heights[layer[dummy]])]
        routes[edge] = (*points, (x[chain[-1]], centres[edge[1]][1] - sizes[edge[1]][1] / 2))
    width = max((x[i] + widths[i] / 2 for i in range(len(x))), default=0.0)
    return Layout(centres, routes, width, tops[-1] + heights[-1] if rows else 0.0)


def _layers(count: int, edges: Sequence[_Edge]) -> list[int]:
    """Longest path from the top; what nothing feeds stands right above its first reader."""
    layer, above = [0] * count, [0] * count
    for _, b in edges:
        above[b] += 1
    ready, remaining = [i for i in range(count) if not above[i]], list(above)
    while ready:
        a = ready.pop()
        for b in (b for p, b in edges if p == a):
            layer[b] = max(layer[b], layer[a] + 1)
            remaining[b] -= 1
            if not remaining[b]:
                ready.append(b)
    for i in range(count):
        readers = [layer[b] for a, b in edges if a == i]
        if not above[i] and readers:
            layer[i] = min(readers) - 1
    return layer


def _ordered(layer: Sequence[int], links: Sequence[_Edge]) -> list[list[int]]:
    """Boxes and invisible boxes of each layer, ordered for few crossings."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for i, number in enumerate(layer):
        rows[number].append(i)
    best, fewest = [list(row) for row in rows], _crossings(rows, links)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            place = {i: p for one in rows for p, i in enumerate(one)}
            pull = {
                i: [place[a] for a, b in links if b == i] if down else [place[b] for a, b in links if a == i]
                for i in row
            }
            row.sort(key=lambda i: (sum(pull[i]) / len(pull[i]) if pull[i] else place[i], place[i]))
        crossings = _crossings(rows, links)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[int]], links: Sequence[_Edge]) -> int:
    place = {i: (number, p) for number, row in enumerate(rows) for p, i in enumerate(row)}
    by_row: dict[int, list[_Edge]] = {}
    for a, b in links:
        by_row.setdefault(place[a][0], []).append((place[a][1], place[b][1]))
    return sum(
        (a - c) * (b - d) < 0 for pairs in by_row.values() for i, (a, b) in enumerate(pairs) for c, d in pairs[:i]
    )


def _positions(
    rows: Sequence[Sequence[int]], widths: Sequence[float], links: Sequence[_Edge], gap: float
) -> list[float]:
    """Centre of each box along x, all boxes at or right of zero."""
    above: list[list[int]] = [[] for _ in widths]
    below: list[list[int]] = [[] for _ in widths]
    for a, b in links:
        below[a].append(b)
        above[b].append(a)
    offsets = [_offsets(row, widths, gap) for row in rows]
    x = [0.0] * len(widths)
    for row, places in zip(rows, offsets, strict=True):
        for i, place in zip(row, places, strict=True):
            x[i] = place - places[-1] / 2
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for number in range(len(rows)) if down else reversed(range(len(rows))):
            row, places = rows[number], offsets[number]
            # One side at a time moves a whole chain at once; both at the end settle it.
            near = [(above if down else below)[i] if sweep < _SWEEPS else above[i] + below[i] for i in row]
            wanted = [_pulled(i, n, x, widths) - place for i, n, place in zip(row, near, places, strict=True)]
            fitted = _isotonic(wanted, [1.0 if widths[i] else _LIGHT for i in row])
            for i, base, place in zip(row, fitted, places, strict=True):
                x[i] = base + place
    left = min((x[i] - widths[i] / 2 for i in range(len(x))), default=0.0)
    return [value - left for value in x]


_LIGHT, _STIFF = 0.01, 8.0
"""A long line gives way to boxes (light), and is straight itself (stiff)."""


def _offsets(row: Sequence[int], widths: Sequence[float], gap: float) -> list[float]:
    """Centres of a row's boxes side by side, from the centre of the first."""
    places = [0.0]
    for a, b in itertools.pairwise(row):
        places.append(places[-1] + (widths[a] + widths[b]) / 2 + gap)
    return places


def _pulled(i: int, neighbours: Sequence[int], x: Sequence[float], widths: Sequence[float]) -> float:
    """Where its neighbours pull a box."""
    line = not widths[i]
    weights = [1.0 if widths[n] else (_STIFF if line else _LIGHT) for n in neighbours]
    if not weights:
        return x[i]
    return sum(w * x[n] for w, n in zip(weights, neighbours, strict=True)) / sum(weights)


def _isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted least squares: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, u, n), (b, v, m) = pools[-2:]
            pools[-2:] = [((a * u + b * v) / (u + v), u + v, n + m)]
    return [mean for mean, _, count in pools for _ in range(count)]


def _straighten(
    line: Sequence[int],
    x: list[float],
    rows: Sequence[Sequence[int]],
    layer: Sequence[int],
    widths: Sequence[float],
    gap: float,
) -> None:
    """Put the invisible boxes of one long edge on one vertical, where their neighbours leave room for it."""
    low, high = float("-inf"), float("inf")
    for i in line:
        row = rows[layer[i]]
        place = row.index(i)
        low = max([low, *(x[n] + widths[n] / 2 + gap / 2 for n in row[max(place - 1, 0) : place])])
        high = min([high, *(x[n] - widths[n] / 2 - gap / 2 for n in row[place + 1 : place + 2])])
    if line and low <= high:
        common = min(max(sum(x[i] for i in line) / len(line), low), high)
        for i in line:
            x[i] = common


def _row_heights(
    rows: Sequence[Sequence[int]], sizes: Sequence[tuple[float, float]], rise: float
) -> tuple[list[float], list[float]]:
    """Top and height of each layer."""
    tops, heights, y = [], [], 0.0
    for row in rows:
        heights.append(max((sizes[i][1] for i in row if i < len(sizes)), default=0.0))
        tops.append(y)
        y += heights[-1] + rise
    return tops, heights
