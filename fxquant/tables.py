"""Tables for people: one small description, shown as text by rich or as HTML in a notebook."""

from __future__ import annotations

import html
import io
import shutil
from dataclasses import dataclass

import rich.box
import rich.console
import rich.table
import rich.text

_ROOM = 110
"""Columns of a terminal from which on the names of weights stay in one piece, so that other columns fold first."""


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns, with notes below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    """Columns that are aligned to the right."""
    notes: tuple[str, ...] = ()

    def to_rich(self, width: int = 0) -> rich.table.Table:
        """The table for a rich console that is `width` columns wide; where there is room, names are not folded."""
        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(self.columns):
            table.add_column(
                column,
                justify="right" if i in self.right else "left",
                overflow="fold",
                no_wrap=not i and width >= _ROOM,
            )
        for row in self.rows:
            table.add_row(*(rich.text.Text(cell) for cell in row))
        return table

    def __str__(self) -> str:
        """The table as text, as wide as the terminal or 160 columns where there is none."""
        width = max(shutil.get_terminal_size((160, 24)).columns, 80)
        buffer = io.StringIO()
        console = rich.console.Console(
            file=buffer, width=width, highlight=False, color_system=None, force_jupyter=False, force_terminal=False
        )
        console.print(self.to_rich(width))
        for note in self.notes:
            console.print(rich.text.Text(note))
        return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())

    def show(self, console: rich.console.Console) -> None:
        """Print the table: in colours on a terminal, elsewhere as plain text that is wide enough."""
        if not console.is_terminal:
            console.print(rich.text.Text(f"{self}\n"), soft_wrap=True)
            return
        console.print(self.to_rich(console.width))
        for note in self.notes:
            console.print(rich.text.Text(note))
        console.print()

    def to_html(self) -> str:
        """The table as an HTML fragment."""
        head = "".join(f"<th style='text-align:left'>{html.escape(c)}</th>" for c in self.columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:{'right' if i in self.right else 'left'}'>{html.escape(cell)}</td>"
                for i, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def bytes_text(count: float) -> str:
    """A number of bytes for people, decimal units as disks have them: `8.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
