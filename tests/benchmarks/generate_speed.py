"""`generate` on a CPU, compiled, with a static cache: bfloat16 beside models in 4 bits by several libraries.

    python tests/benchmarks/generate_speed.py [--models llama-3.2-1b qwen3-0.6b] [--threads 2] [--json FILE]

Models have the sizes of Llama-3.2-1B and Qwen3-0.6B, heads tied as theirs are, and random weights. In all quantized
ones every linear is quantized, the head too (which is untied for it); embeddings stay in bfloat16. Each way runs in a
process of its own that waits for its turn, so that all meet the same load: in every round each generates once, one
sequence, and tokens per second are those after the first. The bound is what a read of the same round would take for
the weights that a token multiplies with, nothing else counted.

Before any ratio is printed, the logits of each model of ours are compared with those of a copy whose weights are
decoded, and what every way generates is as long as it should be. The column `logits` is the relative error against
bfloat16, on random weights, which is larger than on trained ones. All processes together take some 15 GB for the larger
model; with `--one-at-a-time` one follows on the other, and load that comes and goes meets some of them alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generate_worker import WAYS
from linear_speed import versions
from rich.console import Console
from side_by_side import Reading

from fxquant.tables import Table

LARGEST_ERROR = 0.03
"""Of logits of ours against those of decoded weights: every layer rounds to bfloat16, at other places."""


class Worker:
    """A process with one model, which generates when it is told to."""

    def __init__(self, model: str, way: str, options: argparse.Namespace) -> None:
        self.way, self.log = way, tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        script = Path(__file__).with_name("generate_worker.py")
        command = [sys.executable, str(script), model, way, str(options.threads), str(options.tokens)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.about = self.answer()
        self.rates: list[float] = []

    def answer(self) -> dict[str, Any]:
        """The next line that it says; what went wrong where it says nothing more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self.log.seek(0)
        return {"absent": (self.log.read().strip().splitlines() or ["it ended without a word"])[-1][:200]}

    def generate(self) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        self.rates.append(self.answer()["tokens per second"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(model: str, options: argparse.Namespace, console: Console) -> tuple[list[Worker], list[float]]:
    """The workers, with their rates, and what was read per second in each round."""
    reading, workers, rates = Reading.of(), [], []
    for way in options.ways:
        worker = Worker(model, way, options)
        workers.append(worker)
        console.print(f"{model}, {way}: {worker.about}", style="dim")
        if worker.about.get("error", 0.0) > LARGEST_ERROR:
            sys.exit(f"not correct, so no speeds: {way}: logits are off by {worker.about['error']:.2e}")
        if options.one_at_a_time:
            rates += rounds([worker], reading, options.rounds)
            worker.close()
    if not options.one_at_a_time:
        rates = rounds(workers, reading, options.rounds)
        for worker in workers:
            worker.close()
    return workers, rates


def rounds(workers: Sequence[Worker], reading: Reading, count: int) -> list[float]:
    rates = []
    for i in range(count):
        reading.seconds.clear()
        for _ in range(3):
            reading.run()
        rates.append(reading.rate)
        running = [worker for worker in workers if "absent" not in worker.about]
        for j in range(len(running)):
            running[(i + j) % len(running)].generate()
    return rates


def table(model: str, workers: Sequence[Worker], rates: Sequence[float]) -> Table:
    read, rows = statistics.median(rates), []
    present = {w.way: statistics.median(w.rates) for w in workers if w.rates}
    full = max((rate for way, rate in present.items() if way.startswith("bf16")), default=0.0)
    rival = max((rate for way, rate in present.items() if way in ("torchao", "bitsandbytes")), default=0.0)
    for worker in workers:
        if worker.way not in present:
            continue
        rate, about = present[worker.way], worker.about
        ratios = [f"{rate / other:.2f}" if other else "-" for other in (full, rival)]
        moved = rate * about["token bytes"]
        numbers = (f"{about['token bytes'] / 1e6:.0f}", f"{rate:.2f}", *ratios, f"{moved / 1e9:.2f}")
        error = f"{about['logits']:.3f}" if about.get("logits") is not None else "-"
        rows.append((WAYS[worker.way], *numbers, f"{100 * moved / read:.0f} %", error, f"{about['compile']:.0f}"))
    columns = ("way", "MB/token", "tokens/s", "x bf16", "x best rival", "GB/s", "of bound", "logits", "first call, s")
    notes = [f"{read / 1e9:.1f} GB/s read", *(f"absent: {w.way}: {w.about['absent']}" for w in workers if not w.rates)]
    return Table(model, columns, tuple(rows), frozenset(range(1, 9)), tuple(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=("llama-3.2-1b", "qwen3-0.6b"), help="or tiny")
    parser.add_argument("--ways", nargs="*", default=tuple(WAYS), choices=WAYS, help="to run")
    parser.add_argument("--tokens", type=int, default=33, help="generated in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one-at-a-time", action="store_true", help="one model in memory, not all")
    parser.add_argument("--json", type=Path, help="write every rate there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, results = Console(), []
    console.print(f"{versions(options.threads)}, {options.rounds} rounds of {options.tokens} tokens")
    for model in options.models:
        workers, rates = run(model, options, console)
        print(table(model, workers, rates))
        results += [{"model": model, "way": w.way, **w.about, "rates": w.rates, "read": rates} for w in workers]
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(options.threads), "results": results}, indent=1))


if __name__ == "__main__":
    main()
