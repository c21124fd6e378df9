"""Graphs for people: the listing of a region as text, and what changed between two listings."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from fxquant.graph_boxes import first_block, inside, is_quantized, scheme_of, shape_text, weights_of
from fxquant.listing import Listing, NodeRecord

Mark = Literal[" ", "-", "+", "~"]
_CONTEXT = 2
"""Unchanged nodes that are shown around a change."""
_COLOURS: Mapping[str, str] = {"-": "#ffe3e8", "+": "#d8f3dc", "~": "#fff3bf", " ": "transparent"}


class DiffLine(NamedTuple):
    """One line of what a pass did: `-` gone, `+` new, `~` reads something else now, " " as before."""

    mark: Mark
    text: str


def listing_text(listing: Listing, region: str | None = None) -> str:
    """A region of a graph, one node per line, each weight named where it is read.

    Args:
        listing: a graph as plain data.
        region: FQN of a module, such as `model.layers.3`; None for the first of the repeated blocks, "" for everything.
    """
    return "\n".join(_lines(listing, first_block(listing) if region is None else region).values())


def diff(before: Listing, after: Listing, region: str | None = None) -> list[DiffLine]:
    """What changed between two states of a graph within a region; long runs of unchanged nodes become one line."""
    chosen = (first_block(before) or first_block(after)) if region is None else region
    old, new = _lines(before, chosen), _lines(after, chosen)
    found: list[DiffLine] = []
    names = list(old), list(new)
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal":
            found += [DiffLine(" " if old[n] == new[n] else "~", new[n]) for n in names[0][a:b]]
        else:
            found += [DiffLine("-", old[n]) for n in names[0][a:b]] + [DiffLine("+", new[n]) for n in names[1][c:d]]
    return list(_folded(found))


def _lines(listing: Listing, region: str) -> dict[str, str]:
    """A line of text for each node of the region, by name; reads of weights have none of their own."""
    by_name = {r.name: r for r in listing}
    return {r.name: _line(r, region, by_name) for r in listing if r.op != "get_attr" and inside(r, region)}


def _line(record: NodeRecord, region: str, by_name: Mapping[str, NodeRecord]) -> str:
    shape = shape_text(record)
    head = f"{record.name}: {shape} = " if shape else f"{record.name} = "
    weights = weights_of(record, by_name)
    if is_quantized(record) and weights:
        names = " + ".join(_within(weight, region) for weight in weights)
        return f"{head}{record.target}({record.inputs[0]}, {names}, {scheme_of(record)})"
    match record.op:
        case "placeholder":
            return f"{head}input"
        case "output":
            return f"return {record.args}"
        case "call_module":
            return f"{head}{record.kind} {_within(record.target, region)}({record.args})"
    args = record.args
    for name in record.inputs:
        source = by_name.get(name)
        if source is not None and source.op == "get_attr":
            args = re.sub(rf"\b{re.escape(name)}\b", _within(source.target, region), args)
    return f"{head}{record.target}({args})"


def _within(fqn: str, region: str) -> str:
    return fqn.removeprefix(f"{region}.") if region else fqn


def _folded(lines: list[DiffLine]) -> Iterator[DiffLine]:
    near = [any(one.mark != " " for one in lines[max(i - _CONTEXT, 0) : i + _CONTEXT + 1]) for i in range(len(lines))]
    i = 0
    while i < len(lines):
        if near[i]:
            yield lines[i]
            i += 1
            continue
        end = next((j for j in range(i, len(lines)) if near[j]), len(lines))
        yield DiffLine(" ", f"... {end - i} unchanged")
        i = end


def diff_html(lines: Iterable[DiffLine]) -> str:
    """The lines of a diff as an HTML fragment: gone in red and struck out, new in green, changed in yellow."""
    style = "line-height:1.35;font-size:12px;color:#212529;background:#fff;overflow-x:auto"
    return f"<pre style='{style}'>{''.join(map(_line_html, lines))}</pre>"


def _line_html(line: DiffLine) -> str:
    text = html.escape(line.text)
    text = re.sub(r"^(\w+)(: [^=]*)? = ", r"<b>\1</b><span style='color:#868e96'>\2</span> = ", text)
    strike = "text-decoration:line-through;" if line.mark == "-" else ""
    return f"<div style='background:{_COLOURS[line.mark]};{strike}padding:0 6px'>{line.mark} {text}</div>"
