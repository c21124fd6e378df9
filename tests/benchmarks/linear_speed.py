"""Rows times a weight on a CPU: the op on planes beside oneDNN, ATen, bitsandbytes, torchao and plain Inductor.

    python tests/benchmarks/linear_speed.py [--rows 1 4 16 64] [--shape 4096 4096] [--json FILE] [--plot FILE.png]

bfloat16 inputs. Every method is timed once in every round, in turn the first, each on the next of so many copies of its
weight that they take 128 MB together, right after it ran on another one: other load meets all of them, and caches hold
their code, as in a model, but not their weights. Ratios are to the
fastest rival of the same round (of the same numbers of rows): their median, least and most. GB/s are bytes of the
weight as it is stored, beside what torch reads in the same rounds. Before any ratio is printed, what a method gives is
compared with float64. Schemes that quantize activations are another class of accuracy: they have tables of their own,
and so have their rivals. What does not run here is named below the tables. `experts_speed.py` does the same for a layer
of experts, `grid_speed.py` for many shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import linear_rivals
import torch
from linear_methods import Method, decoded_first, function, op, planes_of, run_rounds, wrong
from rich.console import Console
from side_by_side import Reading, report
from speed_plot import keep
from torch import Tensor

from fxquant import native
from fxquant.scheme import Scheme

SCHEMES = ("int4", "nf4", "nf4-dq", "q4_k", "mxfp4", "int8", "fp8", "int4-g128+int8", "int8+int8")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def ours(spelling: str, weight: Tensor, megabytes: float, every: bool) -> list[Method]:
    """The op, and, where `every` way is asked for, what it consists of."""
    planes, decoded = planes_of(spelling, weight, megabytes)
    methods = [op(spelling, planes, decoded)]
    if every and not Scheme.parse(spelling).activation:
        if (
            native.linear(torch.zeros(1, weight.shape[1]), planes[0], Scheme.parse(spelling), len(weight), None)
            is not None
        ):
            methods.append(function(spelling, planes, decoded))
        methods.append(decoded_first(spelling, planes, decoded))
    return methods


def blocks(options: argparse.Namespace, weight: Tensor) -> tuple[dict[str, list[Method]], list[str]]:
    """Methods by the table that they belong to, and what is absent."""
    found: dict[str, list[Method]] = {}
    absent: list[str] = []
    kinds = {"weights alone": linear_rivals.WEIGHT_ONLY, "activations in 8 bits too": linear_rivals.ACTIVATIONS}
    for kind, rivals in kinds.items():
        chosen = [s for s in options.schemes if (Scheme.parse(s).activation is not None) == (kind != "weights alone")]
        if chosen:
            methods = [m for s in chosen for m in ours(s, weight, options.megabytes, options.every_way)]
            others, missing = linear_rivals.present(rivals, weight, options.megabytes)
            if kind == "weights alone":
                others += [linear_rivals.inductor(s, weight, options.megabytes) for s in options.inductor]
            found[kind], absent = [*methods, *others], absent + missing
    return found, absent


def measure(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    weight, lines = torch.randn(*options.shape).mul_(0.02).bfloat16(), []
    found, absent = blocks(options, weight)
    reading = Reading.of()
    for rows in options.rows:
        torch.compiler.reset()  # a graph for these rows, not one for any number of them
        x = torch.randn(rows, options.shape[1]).bfloat16()
        for kind, methods in found.items():
            if problems := wrong(methods, x):
                sys.exit("not correct, so no speeds:\n  " + "\n  ".join(problems))
            run_rounds(methods, x, options.rounds, reading)
            printed = report(methods, rows, f"rows, {kind}", console, reading)
            lines += [{**line, "kind": kind} for line in printed]
    for reason in absent:
        console.print(f"absent: {reason}")
    return lines


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="of x")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), help="N and K")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--inductor", nargs="*", default=("int4",), help="schemes that plain Inductor compiles as well")
    parser.add_argument(
        "--every-way", action="store_true", help="the kernel without the dispatcher, and decoding first"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=float, default=128, help="of copies of a weight")
    parser.add_argument("--json", type=Path, help="write every time and ratio there")
    parser.add_argument("--plot", type=Path, help="draw ratios to oneDNN's bfloat16 by rows there; needs matplotlib")
    return parser.parse_args(given)


def versions(threads: int) -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 200)
    about = f"{versions(options.threads)}, {options.shape[0]} x {options.shape[1]}"
    console.print(f"{about}, {options.rounds} rounds")
    with torch.inference_mode():
        lines = measure(options, console)
    keep(lines, about, "oneDNN bf16", options)


if __name__ == "__main__":
    main()
