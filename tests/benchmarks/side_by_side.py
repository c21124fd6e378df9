"""Methods that were timed in the same rounds, and their ratios to the fastest rival of each round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Timed:
    """One way to compute, and how long it took in each round."""

    name: str
    rival: bool
    """Others are compared with it."""
    seconds: list[float] = field(default_factory=list, kw_only=True)


def report(methods: Sequence[Timed], rows: int, what: str, console: Console) -> list[dict[str, object]]:
    """Print a table of all methods; give back its lines, with every time."""
    rivals = [method for method in methods if method.rival]
    best = [min(times) for times in zip(*(rival.seconds for rival in rivals), strict=True)]
    columns = ("ms", "x best rival", "least", "most", *(f"x {r.name}" for r in rivals))
    table = Table(f"{rows} {what}", *columns, box=None)
    lines: list[dict[str, object]] = []
    for method in methods:
        ratios = [other / own for other, own in zip(best, method.seconds, strict=True)]
        medians = {
            rival.name: statistics.median(a / b for a, b in zip(rival.seconds, method.seconds, strict=True))
            for rival in rivals
        }
        middle = statistics.median(ratios)
        numbers = [f"{v:.2f}" for v in (middle, min(ratios), max(ratios), *medians.values())]
        table.add_row(method.name, f"{1e3 * statistics.median(method.seconds):.3f}", *numbers)
        lines.append(
            {"rows": rows, "method": method.name, "seconds": method.seconds, "ratio": middle, "ratios": medians}
        )
    console.print(table)
    return lines
