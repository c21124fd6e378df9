"""Damage checkpoints in thousands of ways: `load` gives a model that runs, or an error of fxquant, and nothing else.

    python tests/benchmarks/fuzz_load.py [FOLDER ...] [--cases 2000] [--seed 0]

Each FOLDER is a checkpoint, or holds checkpoints; by default those of tests/data. Cases run in chunks, each in an
interpreter of its own with bounded memory: what kills it is found, and is a fault of that case. The exit code is 1 if
any case ended in another exception, in a model that is not whole, in code of the checkpoint that ran, in too much time
or too much memory.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fuzz_case import GROWTH, SECONDS, Result, cases, run_case
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
COMMAND = [sys.executable, __file__, "--chunk"]
CHUNK = 500
WIDTH = 200
ADDRESS_SPACE = 12 << 30
"""Bytes that a chunk may ask for: a larger tensor is an error at once, and not the end of the machine."""
Case = tuple[Path, str, str]


def checkpoints(folders: Sequence[Path]) -> list[Path]:
    """The checkpoints among these directories and right below them."""
    below = (path for folder in folders for path in (folder, *sorted(folder.iterdir())))
    found = [path for path in below if path.is_dir() and (any(path.glob("*.gguf")) or (path / "config.json").is_file())]
    return list(dict.fromkeys(found))


def run_all(todo: Sequence[Case]) -> Iterator[Result | None]:
    """What becomes of each case, in this order; None where there was nothing to damage."""
    done = 0
    while done < len(todo):
        for found in run_chunk(todo[done : done + CHUNK]):
            done += 1
            yield found


def run_chunk(todo: Sequence[Case]) -> Iterator[Result | None]:
    """The cases in an interpreter of their own; if it dies, those up to the one that killed it."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(COMMAND, env=environment, **options) as child:  # type: ignore[call-overload]
        given = json.dumps([(str(folder), kind, seed) for folder, kind, seed in todo])
        # one case takes seconds at most, and a signal cannot end one that is stuck in C
        out, err = _communicate(child, given, 60 + 2 * SECONDS * len(todo))
    lines = [line for line in out.splitlines() if line.startswith(("begin", "{", "null"))]
    for line in lines:
        if line != "begin":
            data = json.loads(line)
            yield None if data is None else Result(**data)
    finished = sum(line != "begin" for line in lines)
    if finished < len(todo):
        folder, kind, seed = todo[finished]
        fault = f"the interpreter died with {child.returncode}\n{err[-2000:]}"
        yield Result(folder.name, kind, seed, outcome="died", problem=fault)


def _communicate(child: subprocess.Popen[str], given: str, seconds: float) -> tuple[str, str]:
    try:
        return child.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()


def chunk() -> None:
    """Run the cases on stdin; a line for the begin and the end of each on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    for folder, kind, seed in json.load(sys.stdin):
        print("begin", flush=True)
        found = run_case(Path(folder), kind, seed)
        print(json.dumps(found and dataclasses.asdict(found)), flush=True)


def report(results: Sequence[Result], console: Console) -> None:
    """A table of what happened, by kind of damage, and every case that must not be so."""
    outcomes = sorted({result.outcome for result in results})
    counts = collections.Counter((result.kind, result.outcome) for result in results)
    table = Table("damage", "cases", *outcomes, box=None)
    for kind in sorted({result.kind for result in results}):
        numbers = [counts[kind, outcome] for outcome in outcomes]
        table.add_row(kind, str(sum(numbers)), *(str(number or "") for number in numbers))
    totals = [sum(result.outcome == outcome for result in results) for outcome in outcomes]
    table.add_row("all", str(len(results)), *map(str, totals), style="bold")
    console.print(table)
    for what, key in (("slowest", "seconds"), ("most memory", "growth")):
        most = max(results, key=lambda result: float(getattr(result, key)))
        size = f"{most.seconds:.1f} s, {most.growth >> 20} MiB more"
        console.print(escape(f"{what}: {size}: {most.source} {most.kind}: {most.what[:200]}"), highlight=False)
    for result in filter(lambda one: one.problem, results):
        console.rule(style="red")
        head = f"{result.source} {result.kind} {result.seed}: {result.what}\n{result.outcome} {result.text}"
        console.print(escape(f"{head}\n{result.problem}"), highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[DATA], metavar="FOLDER")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chunk:
        chunk()
        return 0
    found, console, start = checkpoints(options.folders), Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if not found:
        parser.error("there is no checkpoint in these folders")
    todo = list(cases(found, options.cases, options.seed))
    ran = track(run_all(todo), "damaging", len(todo), console=Console(stderr=True))
    results = [result for result in ran if result is not None]
    report(results, console)
    faults = sum(bool(result.problem) for result in results)
    limits = f"more than {SECONDS} s or {GROWTH >> 20} MiB for a case count"
    console.print(
        f"{len(results)} cases of {len(found)} checkpoints in {time.perf_counter() - start:.0f} s, "
        f"{faults} faults ({limits})",
        highlight=False,
    )
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.exit(main())
