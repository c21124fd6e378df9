"""The progress bar of long work, in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fxquant.plans import Plan, PlanEntry


@contextlib.contextmanager
def layer_progress(plan: Plan, *, enabled: bool) -> Iterator[Callable[[PlanEntry], None]]:
    """A bar over the bytes of the weights to quantize, on stderr; yields what to call after each layer.

    Nothing is shown where stderr is neither a terminal nor a notebook.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = enabled and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("quantizing", total=sum(e.bytes_before for e in plan.quantized))

        def done(entry: PlanEntry) -> None:
            bar.update(task, advance=entry.bytes_before, description=f"quantizing {entry.name}")

        yield done
