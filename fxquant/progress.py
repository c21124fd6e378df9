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
    total = sum(entry.bytes_before for entry in plan.quantized)
    with bytes_progress("quantizing", total, enabled=enabled) as advance:
        yield lambda entry: advance(entry.bytes_before, entry.name)


@contextlib.contextmanager
def bytes_progress(what: str, total: int, *, enabled: bool) -> Iterator[Callable[[int, str], None]]:
    """A bar over bytes, likewise; yields what to call with the bytes that are done, and the name of their layer."""
    with _bar(DownloadColumn(), TransferSpeedColumn(), enabled=enabled) as bar:
        task = bar.add_task(what, total=total)

        def done(nbytes: int, name: str) -> None:
            bar.update(task, advance=nbytes, description=f"{what} {name}")

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
