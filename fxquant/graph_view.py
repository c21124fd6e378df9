"""Graphs and histories for people: text, and HTML for notebooks and files."""

from __future__ import annotations

import difflib
import html
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from fxquant.errors import FileError
from fxquant.graph_boxes import first_block, inside, is_quantized, scheme_of, shape_text, weights_of
from fxquant.graph_picture import Picture, draw_pair
from fxquant.listing import Listing, NodeRecord
from fxquant.rewrite import History, Step

Mark = Literal[" ", "-", "+", "~"]
_CONTEXT = 2
"""Unchanged nodes that are shown around a change."""
_PRE = "line-height:1.35;font-size:12px;color:#212529;background:#fff;overflow-x:auto"
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


def history_text(history: History, region: str | None = None) -> str:
    """Per pass: how often it fired, where it stayed out and why, and what it changed in a region."""
    if history.reason:
        return f"no graph, so no history: {history.reason}"
    lines, before = [f"captured: {len(history.before)} nodes"], history.before
    for step in history.steps:
        lines += ["", _summary(step), *(f"  {miss}" for miss in _misses(step, before))]
        changes = diff(before, step.after, region)
        if any(line.mark != " " for line in changes):
            lines += [f"  {line.mark} {line.text}" for line in changes]
        before = step.after
    return "\n".join(lines)


def before_and_after(history: History, region: str | None = None) -> Picture:
    """The dataflow of a region as captured and after the last pass, side by side: gone in red, new in green."""
    chosen = first_block(history.before) if region is None else region
    place = f" ({chosen})" if chosen else ""
    titles = (f"captured{place}", f"after {len(history.steps)} passes{place}")
    return draw_pair(history.before, history.after, chosen, titles=titles)


def history_html(history: History, region: str | None = None) -> str:
    """An HTML fragment: the picture before and after, then what each pass did, to unfold."""
    if history.reason:
        return f"<p>no graph, so no history: {html.escape(history.reason)}</p>"
    chosen = first_block(history.before) if region is None else region
    parts = [before_and_after(history, chosen)._repr_html_()]
    before = history.before
    for step in history.steps:
        changes = diff(before, step.after, chosen)
        misses = "".join(f"<li>{html.escape(miss)}</li>" for miss in _misses(step, before))
        body = "".join(_line_html(line) for line in changes)
        parts.append(
            f"<details><summary style='font-family:monospace'>{html.escape(_summary(step))}</summary>"
            f"{f'<ul>{misses}</ul>' if misses else ''}"
            f"<p>in <code>{html.escape(chosen or 'the whole graph')}</code>:</p>"
            f"<pre style='{_PRE}'>{body}</pre></details>"
        )
        before = step.after
    return f"<div>{''.join(parts)}</div>"


def save_html(history: History, path: str | os.PathLike[str], region: str | None = None) -> None:
    """Write a history as one HTML page that needs nothing else.

    Raises:
        FileError: the file cannot be written.
    """
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fxquant: history of a graph</title></head>"
        f"<body style='font-family:system-ui,sans-serif;margin:24px'>{history_html(history, region)}</body></html>\n"
    )
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write the history to {os.fspath(path)}: {error.strerror or error}") from None


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


def _summary(step: Step) -> str:
    return f"{step.name}: fired {len(step.fired)} times, {len(step.after)} nodes, {step.seconds:.2f} s"


def _misses(step: Step, before: Listing) -> list[str]:
    """One line for each reason why the pass stayed out of places, with the first of them; modules by their names."""
    modules = {r.name: r.target for r in before if r.op == "call_module"}
    reasons: dict[str, list[str]] = {}
    for miss in step.missed:
        reasons.setdefault(miss.reason, []).append(modules.get(miss.node, miss.node))
    return [
        f"stayed out of {len(nodes)}: {reason} ({', '.join(nodes[:3])}{', ...' if len(nodes) > 3 else ''})"
        for reason, nodes in reasons.items()
    ]


def _line_html(line: DiffLine) -> str:
    text = html.escape(line.text)
    text = re.sub(r"^(\w+)(: [^=]*)? = ", r"<b>\1</b><span style='color:#868e96'>\2</span> = ", text)
    strike = "text-decoration:line-through;" if line.mark == "-" else ""
    return f"<div style='background:{_COLOURS[line.mark]};{strike}padding:0 6px'>{line.mark} {text}</div>"
