"""Layout of boxes: nothing overlaps, arrows go down, positions are the best there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.graph_layout import _isotonic, layered


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_layout_overlaps_nothing_and_every_arrow_goes_down(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    size = st.tuples(st.floats(10, 200), st.floats(10, 60))
    sizes = data.draw(st.lists(size, min_size=count, max_size=count))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    edges = data.draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    layout = layered(sizes, edges, gap=10, rise=20)
    rects = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(layout.centres, sizes, strict=True)]
    for a, b in itertools.combinations(rects, 2):
        assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] + 1e-6 or b[3] <= a[1] + 1e-6
    for left, top, right, bottom in rects:
        assert left >= -1e-6
        assert top >= -1e-6
        assert right <= layout.width + 1e-6
        assert bottom <= layout.height + 1e-6
    assert set(layout.routes) == set(edges)
    for (a, b), points in layout.routes.items():
        assert points[0] == pytest.approx((layout.centres[a][0], rects[a][3]))
        assert points[-1] == pytest.approx((layout.centres[b][0], rects[b][1]))
        heights = [y for _, y in points]
        assert heights == sorted(heights)
        for (x, y), rect in itertools.product(points[1:-1], rects):
            assert not (rect[0] < x < rect[2] and rect[1] < y < rect[3]), "a line runs through a box"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.05, 5)), min_size=1, max_size=8))
def test_isotonic_regression_finds_the_optimum(pairs: list[tuple[float, float]]) -> None:
    """The optimum is constant on consecutive blocks, each at its weighted mean: try all ways to cut."""
    values, weights = zip(*pairs, strict=True)

    def loss(fit: list[float]) -> float:
        return sum(w * (v - f) ** 2 for v, w, f in zip(values, weights, fit, strict=True))

    best = float("inf")
    for cuts in itertools.product((False, True), repeat=len(values) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(values)]
        fit: list[float] = []
        for a, b in itertools.pairwise(edges):
            mean = sum(v * w for v, w in pairs[a:b]) / sum(weights[a:b])
            fit += [mean] * (b - a)
        if fit == sorted(fit):
            best = min(best, loss(fit))
    found = _isotonic(values, weights)
    assert found == sorted(found)
    assert loss(found) == pytest.approx(best, rel=1e-6, abs=1e-6)
