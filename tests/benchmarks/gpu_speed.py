"""Rows times a weight on a CUDA GPU: the op as `torch.compile` makes it, beside cuBLAS and other libraries.

    python tests/benchmarks/gpu_speed.py [--rows 1 16 64 512] [--shape 8192 8192] [--json FILE] [--plot FILE.png]

bfloat16 inputs. A method is a CUDA graph, in which every copy of its weight is multiplied once: so many copies that no
cache holds them. Graphs are replayed in turn, round by round, and timed by the GPU's own clock; a time is that of one
copy. Ratios are to the fastest rival of the same round: their median, least and most. GB/s are bytes of the weight as
it is stored, beside what a sum of a large array reads in the same rounds. Before any ratio is printed, what a method
gives is compared with float64. Schemes that quantize activations have tables of their own, and so have their rivals.
What does not run here is named below the tables. `tune_tiles.py` measures tiles, `linear_speed.py` does the same on a
CPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_rivals
import torch
from linear_methods import Method, op, planes_of, wrong
from linear_rivals import present
from rich.console import Console
from side_by_side import Timed, report
from speed_plot import keep
from torch import Tensor

from fxquant.ops import ABI
from fxquant.scheme import Scheme

SCHEMES = (
    *("int4", "nf4", "nf4-dq", "q4_k", "mxfp4", "int3-g64", "int8", "fp8"),
    *("int4-g128+int8", "int8+int8", "fp8+fp8"),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
Clock = Callable[[Callable[[], object]], Callable[[], float]]
"""From some work to a function that does it, as often as it is called, and gives the seconds that it took."""


def graph_clock(work: Callable[[], object]) -> Callable[[], float]:
    """The work as a CUDA graph, timed by events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled or chosen in the first calls is no part of a graph
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return replay


@dataclass
class Round(Timed):
    """Some work that reads `nbytes` in each of its `calls`, all of them once in a round."""

    clock: Callable[[], float] = field(kw_only=True)
    calls: int = field(default=1, kw_only=True)

    def run(self) -> None:
        self.seconds.append(self.clock() / self.calls)


def read(megabytes: float, device: torch.device, clock: Clock) -> Round:
    """The sum of an array of float32."""
    array = torch.ones(int(megabytes * 1e6) // 4, device=device)
    return Round("read", False, nbytes=array.nbytes, clock=clock(array.sum))


def rounds_of(method: Method, x: Tensor, clock: Clock) -> Round:
    """A method, with every copy of its weight."""

    def work() -> None:
        for copy in method.copies:
            copy(x)

    calls = len(method.copies)
    return Round(method.name, method.rival, nbytes=method.nbytes, clock=clock(work), calls=calls)


def ours(spelling: str, weight: Tensor, megabytes: float) -> Method:
    """The op on planes, as `torch.compile` makes it."""
    planes, decoded = planes_of(spelling, weight, megabytes)
    method, rows = op(spelling, planes, decoded), [len(decoded)]

    @torch.compile(dynamic=False, fullgraph=True)
    def multiply(x: Tensor, held: list[Tensor]) -> Tensor:
        y: Tensor = torch.ops.fxquant.linear(x, held, [], spelling, rows, ABI)
        return y

    method.copies = [functools.partial(multiply, held=list(p.values())) for p in planes]
    return method


def measure(
    options: argparse.Namespace, console: Console, device: torch.device, clock: Clock
) -> list[dict[str, object]]:
    weight = torch.randn(*options.shape, device=device).mul_(0.02).bfloat16()
    found: list[dict[str, object]] = []
    missing: list[str] = []
    for kind, rivals in gpu_rivals.KINDS.items():
        chosen = [s for s in options.schemes if (Scheme.parse(s).activation is None) == (kind == "weights alone")]
        if not chosen:
            continue
        methods = [ours(spelling, weight, options.megabytes) for spelling in chosen]
        others, absent = present(rivals, weight, options.megabytes)
        missing += absent
        for rows in options.rows:
            torch.compiler.reset()  # a graph for these rows, not one for any number of them
            x = torch.randn(rows, options.shape[1], device=device).bfloat16()
            here = [method for method in others if gpu_rivals.takes(method, x)]
            if problems := wrong([*methods, *here], x):
                sys.exit("not correct, so no speeds:\n  " + "\n  ".join(problems))
            reading = read(options.megabytes, device, clock)
            timed = [rounds_of(method, x, clock) for method in (*methods, *here)]
            for i in range(options.rounds):
                for one in (reading, *timed[i % len(timed) :], *timed[: i % len(timed)]):
                    one.run()
            lines = report(timed, rows, f"rows, {kind}", console, reading)
            found += [{**line, "kind": kind} for line in lines]
    for reason in missing:
        console.print(f"absent: {reason}")
    return found


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="of x")
    parser.add_argument("--shape", type=int, nargs=2, default=(8192, 8192), help="N and K")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=float, default=512, help="of copies of a weight: more than a cache holds")
    parser.add_argument("--json", type=Path, help="write every time and ratio there")
    parser.add_argument("--plot", type=Path, help="draw ratios to cuBLAS's bfloat16 by rows there; needs matplotlib")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_speed: there is no CUDA GPU here, so nothing was measured")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 200)
    about = f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {options.shape[0]} x {options.shape[1]}"
    console.print(f"{about}, {options.rounds} rounds")
    with torch.inference_mode():
        lines = measure(options, console, torch.device("cuda"), graph_clock)
    keep(lines, about, gpu_rivals.BASE, options)


if __name__ == "__main__":
    main()
