"""The progress bars of long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fxquant.plans import Plan, PlanEntry


@contextlib.contextmanager
def layer_progress(plan: Plan, *, enabled: bool) -> Iterator[Callable[[PlanEntry], None]]:
    """A bar over the bytes of the weights to quantize, on stderr; yields what to call after each layer.

    Nothing is shown where stderr is neither a terminal nor a notebook.
    """
    with _bar(DownloadColumn(), TransferSpeedColumn(), enabled=enabled) as bar:
        task = bar.add_task("quantizing", total=sum(e.bytes_before for e in plan.quantized))

        def done(entry: PlanEntry) -> None:
            bar.update(task, advance=entry.bytes_before, description=f"quantizing {entry.name}")

        yield done


@contextlib.contextmanager
def batch_progress(total: int | None, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """A bar over the batches of a calibration, likewise; yields what to call after each.

    `total` is None where nobody knows how many there are.
    """
    with _bar(MofNCompleteColumn(), enabled=enabled) as bar:
        task = bar.add_task("calibrating", total=total)

        def done() -> None:
            bar.update(task, advance=1)

        yield done


def _bar(*columns: ProgressColumn, enabled: bool) -> Progress:
    console = Console(stderr=True)
    shown = enabled and (console.is_terminal or console.is_jupyter)
    text, remaining = TextColumn("{task.description}"), TimeRemainingColumn()
    return Progress(text, BarColumn(), *columns, remaining, console=console, disable=not shown)
