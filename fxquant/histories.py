"""What passes did to a graph: plain data, shown as text, as HTML in a notebook, or as a page."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import FileError
from fxquant.graph_boxes import first_block
from fxquant.graph_picture import Picture, draw_pair
from fxquant.graph_view import DiffLine, diff, diff_html
from fxquant.listing import Listing


@dataclass(frozen=True)
class Miss:
    """Why a pass left a place alone."""

    reason: str
    node: str = ""
    """Name of the node; the root of the match where a check does not say."""


@dataclass(frozen=True)
class Fired:
    """One place that a pass rewrote."""

    removed: tuple[str, ...]
    """Names of the nodes whose values are now made in another way."""
    added: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Step:
    """What one pass did."""

    name: str
    """The pass's `repr`."""
    fired: tuple[Fired, ...]
    missed: tuple[Miss, ...]
    after: Listing
    seconds: float

    def __str__(self) -> str:
        """One line: how often it fired, and how many nodes there are after it."""
        return f"{self.name}: fired {len(self.fired)} times, {len(self.after)} nodes, {self.seconds:.2f} s"


@dataclass(frozen=True)
class History:
    """The graph before the first pass and after each one. Holds text, no tensors."""

    before: Listing = ()
    steps: tuple[Step, ...] = ()
    reason: str = ""
    """Why there is no graph, where there is none."""

    @property
    def after(self) -> Listing:
        """The graph after the last pass."""
        return self.steps[-1].after if self.steps else self.before

    def text(self, region: str | None = None) -> str:
        """Per pass: how often it fired, where it stayed out and why, and what it changed in a region.

        Args:
            region: FQN of a module, such as `model.layers.3`; None for the first of the repeated blocks, "" for all.
        """
        if self.reason:
            return f"no graph, so no history: {self.reason}"
        lines = [f"captured: {len(self.before)} nodes"]
        for step, misses, changes in self._changes(self._region(region)):
            lines += ["", str(step), *(f"  {miss}" for miss in misses)]
            lines += [f"  {line.mark} {line.text}" for line in changes]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The history in the first of the repeated blocks."""
        return self.text()

    def picture(self, region: str | None = None) -> Picture:
        """The dataflow of a region as captured and after the last pass, side by side: gone in red, new in green.

        Args:
            region: as for `text`.

        Returns:
            SVG text, and a picture in a notebook.
        """
        chosen = self._region(region)
        place = f" ({chosen})" if chosen else ""
        titles = (f"captured{place}", f"after {len(self.steps)} passes{place}")
        return draw_pair(self.before, self.after, chosen, titles=titles)

    def to_html(self, region: str | None = None) -> str:
        """An HTML fragment: the picture, then what each pass did, to unfold.

        Args:
            region: as for `text`.
        """
        if self.reason:
            return f"<p>no graph, so no history: {html.escape(self.reason)}</p>"
        chosen = self._region(region)
        place = html.escape(chosen or "the whole graph")
        parts = [self.picture(chosen)._repr_html_()]
        for step, misses, changes in self._changes(chosen):
            reasons = "".join(f"<li>{html.escape(miss)}</li>" for miss in misses)
            summary = f"<summary style='font-family:monospace'>{html.escape(str(step))}</summary>"
            listed = f"<ul>{reasons}</ul>" if reasons else ""
            shown = f"<p>in {place}:</p>{diff_html(changes)}" if changes else f"<p>changed nothing in {place}</p>"
            parts.append(f"<details>{summary}{listed}{shown}</details>")
        return f"<div>{''.join(parts)}</div>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def save_html(self, path: str | os.PathLike[str], region: str | None = None) -> None:
        """Write the history as one HTML page that needs nothing else.

        Raises:
            FileError: the file cannot be written.
        """
        page = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fxquant: history of a graph</title>"
            f"</head><body style='font-family:system-ui,sans-serif;margin:24px'>{self.to_html(region)}</body></html>\n"
        )
        try:
            Path(path).write_text(page, encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot write the history to {os.fspath(path)}: {error.strerror or error}") from None

    def _region(self, region: str | None) -> str:
        return first_block(self.before) or first_block(self.after) if region is None else region

    def _changes(self, region: str) -> Iterator[tuple[Step, list[str], list[DiffLine]]]:
        """Each step with the places that it stayed out of and its diff; the diff is empty where nothing changed."""
        before = self.before
        for step in self.steps:
            lines = diff(before, step.after, region)
            yield step, _misses(step, before), lines if any(line.mark != " " for line in lines) else []
            before = step.after


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
