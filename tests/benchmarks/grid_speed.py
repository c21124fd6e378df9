"""Sixty products of few and many rows, in ten schemes, beside bfloat16 as a compiled model has it: none much slower.

    python tests/benchmarks/grid_speed.py [--rounds 7] [--all] [--json FILE]

Ratios are of oneDNN's bfloat16 product of a packed weight, which is what Inductor makes of a frozen model, to
`fxquant::linear`, both once in every round on the next of several copies of their weights, behind a run on another one:
medians, least and most. What the op gives is compared with float64 before. Rows whose median is below 0.9 are marked,
and the exit code is 1 if one of them is not in `LISTED` with the reason. `--all` takes every scheme with every shape
and every number of rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from linear_methods import op, planes_of, run_rounds, wrong
from linear_rivals import onednn
from linear_speed import versions
from rich.console import Console
from side_by_side import Reading

from fxquant.tables import Table

SCHEMES = (
    *("int4-g128", "int4-g32", "int4-g64-asym", "nf4", "mxfp4", "q4_k"),
    *("int8", "fp8", "int3-g64", "int4-g128+int8"),
)
ROWS = (1, 4, 16, 64, 256)
SHAPES = ((4096, 4096), (2048, 8192), (1536, 8960), (4096, 14336), (512, 2048))
"""N and K: square, of projections down, and a small one of keys and values."""
LEAST = 0.9
LISTED: dict[tuple[str, int, int, int], str] = {}
"""Scheme, rows, N, K: why it may be slower."""

Case = tuple[str, int, int, int]


def cases(every: bool) -> Iterator[Case]:
    """Six of 25 for each scheme, spread so that every number of rows and every shape comes up equally often."""
    if every:
        yield from ((s, m, n, k) for s, m, (n, k) in itertools.product(SCHEMES, ROWS, SHAPES))
        return
    for i, scheme in enumerate(SCHEMES):
        for j in range(6):
            n, k = SHAPES[(2 * i + j + j // 5) % len(SHAPES)]
            yield scheme, ROWS[(i + j) % len(ROWS)], n, k


def measure(case: Case, options: argparse.Namespace, reading: Reading) -> list[float]:
    """Ratio of every round.

    Raises:
        SystemExit: the result is not correct.
    """
    spelling, m, n, k = case
    weight, x = torch.randn(n, k).mul_(0.02).bfloat16(), torch.randn(m, k).bfloat16()
    methods = [onednn(weight, options.megabytes), op(spelling, *planes_of(spelling, weight, options.megabytes))]
    if found := wrong(methods, x):
        sys.exit("not correct, so no speeds:\n  " + "\n  ".join(found))
    run_rounds(methods, x, options.rounds, reading)
    return [full / own for full, own in zip(methods[0].seconds, methods[1].seconds, strict=True)]


def note(case: Case, ratio: float) -> str:
    if ratio >= LEAST:
        return "listed, but fast" if case in LISTED else ""
    return LISTED.get(case, "SLOW")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="*", help="only these")
    parser.add_argument("--all", action="store_true", help="all 250 combinations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=float, default=64, help="of copies of a weight")
    parser.add_argument("--json", type=Path, help="write every ratio there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console, reading = Console(), Reading.of(16)
    console.print(f"{versions(options.threads)}, {options.rounds} rounds")
    ratios: dict[Case, list[float]] = {}
    with torch.inference_mode():
        for case in cases(options.all):
            if not options.schemes or case[0] in options.schemes:
                ratios[case] = measure(case, options, reading)
                console.print(f"{len(ratios)}: {case} {statistics.median(ratios[case]):.2f}", style="dim")
    middle = {case: statistics.median(found) for case, found in ratios.items()}
    rows = [
        (*map(str, case), *(f"{v:.2f}" for v in (middle[case], min(found), max(found))), note(case, middle[case]))
        for case, found in ratios.items()
    ]
    columns = ("scheme", "rows", "N", "K", "x bf16", "least", "most", "")
    slow = [case for case in ratios if middle[case] < LEAST]
    notes = f"{len(ratios) - len(slow)} of {len(ratios)} at least {LEAST} times as fast as compiled bfloat16"
    print(Table("against oneDNN bf16", columns, tuple(rows), frozenset(range(1, 7)), (notes,)))
    if options.json:
        data = [{"case": case, "ratios": found, "note": note(case, middle[case])} for case, found in ratios.items()]
        options.json.write_text(json.dumps({"versions": versions(options.threads), "rows": data}, indent=1))
    sys.exit(any(case not in LISTED for case in slow))


if __name__ == "__main__":
    main()
