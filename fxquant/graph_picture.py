"""Pictures of graphs: the dataflow of a region as SVG."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fxquant.graph_boxes import Box, first_block, to_boxes
from fxquant.graph_layout import Layout, layered
from fxquant.listing import Listing

_MAX_BOXES = 150
_CHARACTER, _LINE, _PAD = 6.7, 15.0, 9.0
"""Width of a character of the 11 px monospaced font, height of a line, space around the text."""
_MARGIN, _HEAD, _FOOT = 16.0, 34.0, 26.0
_GONE, _NEW = "#d6336c", "#0ca678"
_TEXT = "font-family='ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace'"


class _Style(NamedTuple):
    fill: str
    stroke: str
    text: str
    legend: str


_STYLES = {
    "quantized": _Style("#d8f3dc", "#2d8a4e", "#123d22", "quantized"),
    "linear": _Style("#fde8cd", "#c77d1a", "#4d3008", "full precision"),
    "op": _Style("#f1f3f5", "#adb5bd", "#343a40", "other ops"),
    "input": _Style("#ffffff", "#868e96", "#495057", "from and to the rest"),
    "output": _Style("#ffffff", "#868e96", "#495057", ""),
}


class Picture(str):
    """SVG text that a notebook shows as a picture."""

    def _repr_html_(self) -> str:
        return f"<div style='overflow-x:auto'>{self}</div>"


def draw(listing: Listing, region: str | None = None, *, title: str = "") -> Picture:
    """The dataflow of a region: one box per linear, and one for what each module computes between linears.

    Args:
        listing: a graph as plain data: `fxquant.listing.listing(graph_module)`, or `before` and `after` of a history.
        region: FQN of a module, such as `model.layers.3`; None for the first of the repeated blocks, "" for everything.
        title: a line above the picture.

    Returns:
        SVG text, and a picture in a notebook.
    """
    chosen = first_block(listing) if region is None else region
    return _svg([(title or chosen, *_panel(listing, chosen))])


def draw_pair(before: Listing, after: Listing, region: str | None = None, *, titles: tuple[str, str]) -> Picture:
    """Two states of one graph side by side: what is gone framed in red, what is new in green.

    Args:
        before: the graph as it was.
        after: the graph as it is.
        region: as for `draw`.
        titles: a line above each.
    """
    chosen = (first_block(before) or first_block(after)) if region is None else region
    old, new = ({r.name for r in one} for one in (before, after))
    return _svg(
        [
            (titles[0], *_panel(before, chosen, old - new, _GONE)),
            (titles[1], *_panel(after, chosen, new - old, _NEW)),
        ]
    )


def _panel(listing: Listing, region: str, marked: Collection[str] = (), colour: str = "") -> tuple[str, float, float]:
    """One graph as SVG elements, with its width and height."""
    found = to_boxes(listing, region)
    if not found.boxes:
        note = f"no node of the graph runs in {region}" if region else "the graph is empty"
        return _text(0, _LINE, note, "#495057"), len(note) * _CHARACTER, 2 * _LINE
    boxes, edges = found.boxes[:_MAX_BOXES], [e for e in found.edges if max(e) < _MAX_BOXES]
    sizes = [_size(box) for box in boxes]
    layout = layered(sizes, edges)
    parts = [_arrow(layout.routes[edge]) for edge in layout.routes]
    for box, size, centre in zip(boxes, sizes, layout.centres, strict=True):
        changed = box.kind not in ("input", "output") and all(name in marked for name in box.nodes)
        parts.append(_draw_box(box, size, centre, colour if changed else ""))
    return "".join(parts) + _rest(len(found.boxes), layout), layout.width, layout.height + _LINE


def _rest(count: int, layout: Layout) -> str:
    if count <= _MAX_BOXES:
        return ""
    return _text(0, layout.height + _LINE, f"... and {count - _MAX_BOXES} boxes more: choose a region", "#495057")


def _size(box: Box) -> tuple[float, float]:
    lines = [box.title, *box.detail]
    return max(len(line) for line in lines) * _CHARACTER + 2 * _PAD, len(lines) * _LINE + _PAD


def _draw_box(box: Box, size: tuple[float, float], centre: tuple[float, float], mark: str) -> str:
    style, (w, h), (x, y) = _STYLES[box.kind], size, centre
    dashed = " stroke-dasharray='4 3'" if box.kind in ("input", "output") else ""
    frame = f"stroke='{mark}' stroke-width='2.5'" if mark else f"stroke='{style.stroke}'"
    rect = (
        f"<rect x='{x - w / 2:.1f}' y='{y - h / 2:.1f}' width='{w:.1f}' height='{h:.1f}' rx='6' "
        f"fill='{style.fill}' {frame}{dashed}/>"
    )
    first = y - h / 2 + _PAD / 2 + 11
    lines = [
        _text(x, first + i * _LINE, line, style.text, bold=i == 0, middle=True)
        for i, line in enumerate((box.title, *box.detail))
    ]
    tip = f"<title>{html.escape(', '.join(box.nodes))}</title>" if box.nodes else ""
    return f"<g>{tip}{rect}{''.join(lines)}</g>"


def _text(
    x: float, y: float, text: str, colour: str, *, bold: bool = False, middle: bool = False, size: int = 11
) -> str:
    weight = " font-weight='600'" if bold else ""
    anchor = " text-anchor='middle'" if middle else ""
    style = f"{_TEXT} font-size='{size}' fill='{colour}'{weight}{anchor}"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{html.escape(text)}</text>"


def _arrow(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line: vertical where it leaves, passes and arrives."""
    (x, y), path = points[0], f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for u, v in points[1:]:
        bend = (v - y) / 2
        path += f"C{x:.1f},{y + bend:.1f} {u:.1f},{v - bend:.1f} {u:.1f},{v:.1f}"
        x, y = u, v
    head = f"M{x - 3.5:.1f},{y - 6:.1f}L{x:.1f},{y:.1f}L{x + 3.5:.1f},{y - 6:.1f}"
    return f"<path d='{path}{head}' fill='none' stroke='#868e96' stroke-width='1.2'/>"


def _svg(panels: Sequence[tuple[str, str, float, float]]) -> Picture:
    parts, x = [], _MARGIN
    for title, body, width, _ in panels:
        parts.append(_text(x, _MARGIN + 10, title, "#212529", bold=True, size=13))
        parts.append(f"<g transform='translate({x:.1f},{_MARGIN + _HEAD - 10:.1f})'>{body}</g>")
        x += max(width, len(title) * _CHARACTER * 1.2) + 3 * _MARGIN
    bottom = max(height for *_, height in panels) + _HEAD + _MARGIN + 6
    legend, right = _legend(_MARGIN, bottom, pair=len(panels) > 1)
    width, height = max(x - 2 * _MARGIN, right), bottom + _FOOT
    return Picture(
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}'>"
        f"<rect width='{width:.0f}' height='{height:.0f}' rx='8' fill='#ffffff'/>{''.join(parts)}{legend}</svg>"
    )


def _legend(x: float, y: float, *, pair: bool) -> tuple[str, float]:
    """What colours mean, and where the line ends."""
    entries = [(style.fill, style.stroke, 1.0, style.legend) for style in _STYLES.values() if style.legend]
    if pair:
        entries += [("#ffffff", _GONE, 2.5, "gone"), ("#ffffff", _NEW, 2.5, "new")]
    parts = []
    for fill, stroke, width, legend in entries:
        frame = f"fill='{fill}' stroke='{stroke}' stroke-width='{width}'"
        parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='12' height='12' rx='3' {frame}/>")
        parts.append(_text(x + 18, y + 10, legend, "#495057"))
        x += 18 + len(legend) * _CHARACTER + 20
    return "".join(parts), x
