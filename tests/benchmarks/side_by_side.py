"""Methods that were timed in the same rounds, and their ratios to the fastest rival of each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Timed:
    """One way to compute, and how long it took in each round."""

    name: str
    rival: bool
    """Others are compared with it."""
    seconds: list[float] = field(default_factory=list, kw_only=True)
    nbytes: int = field(default=0, kw_only=True)
    """Bytes of the weight, read in every call; 0: not told."""

    @property
    def rate(self) -> float:
        """Bytes per second, median of the rounds."""
        return self.nbytes / statistics.median(self.seconds)


@dataclass
class Reading(Timed):
    """A read of arrays that no cache holds, half of one by each of two products of torch's: the faster one's bandwidth.

    One reads from start to end, the other in two places at once; CPUs differ in which they like.
    """

    arrays: list[torch.Tensor] = field(default_factory=list, kw_only=True)

    @staticmethod
    def of(megabytes: int = 64, copies: int = 2) -> Reading:
        arrays = [torch.ones(megabytes << 9, 1024) for _ in range(copies)]
        return Reading("read", False, nbytes=arrays[0].nbytes // 2, arrays=arrays)

    def run(self) -> None:
        array = self.arrays[len(self.seconds) % len(self.arrays)]
        first, second = array.chunk(2)  # what one has read, caches may hold
        ones, places = torch.ones(array.shape[1]), second.view(2, -1)
        products = (lambda: torch.mv(first, ones), lambda: torch.dot(*places))
        self.seconds.append(min(map(seconds_of, products)))


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(
    methods: Sequence[Timed], rows: int, what: str, console: Console, reading: Timed | None = None
) -> list[dict[str, object]]:
    """Print a table of all methods; give back its lines, with every time.

    With a `reading` of the same rounds there are two columns more: GB/s of weights, and their share of what it reads.
    """
    rivals = [method for method in methods if method.rival]
    best = [min(times) for times in zip(*(rival.seconds for rival in rivals), strict=True)]
    bandwidth = ("GB/s", "of read") if reading else ()
    columns = ("ms", *bandwidth, "x best rival", "least", "most", *(f"x {r.name}" for r in rivals))
    title = f"{rows} {what}" + (f", {reading.rate / 1e9:.1f} GB/s read" if reading else "")
    table = Table("", *columns, box=None)
    lines: list[dict[str, object]] = []
    for method in methods:
        ratios = [other / own for other, own in zip(best, method.seconds, strict=True)]
        medians = {
            rival.name: statistics.median(a / b for a, b in zip(rival.seconds, method.seconds, strict=True))
            for rival in rivals
        }
        middle = statistics.median(ratios)
        numbers = [f"{v:.2f}" for v in (middle, min(ratios), max(ratios), *medians.values())]
        line = {"rows": rows, "method": method.name, "rival": method.rival, "seconds": list(method.seconds)}
        line |= {"ratio": middle, "ratios": medians}
        if reading:
            share = statistics.median(
                method.nbytes / own * other / reading.nbytes
                for own, other in zip(method.seconds, reading.seconds, strict=True)
            )
            numbers = [f"{method.rate / 1e9:.1f}", f"{100 * share:.0f} %", *numbers]
            line |= {"bytes per second": method.rate, "share of read": share}
        table.add_row(method.name, f"{1e3 * statistics.median(method.seconds):.3f}", *numbers)
        lines.append(line)
    console.print(f"\n[bold]{title}[/bold]", table, sep="\n")
    return lines
