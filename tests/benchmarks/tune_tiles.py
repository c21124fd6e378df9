"""Measures the tiles of `fxquant::linear` on the GPU at hand, and writes the best ones into the table of the package.

    python tests/benchmarks/tune_tiles.py [--shape 4096 4096] [--rows 8 16 32 64] [--scheme int4-g128]

For every scheme, weight and number of rows, each tile is compiled with each number of splits, compared with float64 and
then timed: tiles in turn, round by round, in CUDA graphs whose calls read so many copies of the weight that no cache
holds them. The entries of this GPU for these weights are replaced, all others stay. Without a GPU it changes nothing,
and says so. The table is part of no key of Inductor's cache: raise `fxquant.ops.ABI` with a new one, or graphs compiled
before keep the old tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import codecs
from fxquant.lowering import tiles as lowering_tiles
from fxquant.lowering.shapes import Choice, Shape, Tile, parse
from fxquant.ops import ABI
from fxquant.scheme import Scheme

TABLE = Path(str(importlib.resources.files("fxquant.lowering"))) / "shapes.json"
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192)]
WARPS, STAGES = (4, 8), (2, 3, 4)
BYTES = 256 << 20
"""Copies of a weight take so many bytes together: more than any GPU's second-level cache."""


def tiles() -> list[Tile]:
    """What is tried: every tile up to 64 x 128."""
    sizes = itertools.product((16, 32, 64), (32, 64, 128), (64, 128), WARPS, STAGES)
    return [Tile(*size) for size in sizes if size[0] * size[1] >= 512]


def entry(shape: Shape, choice: Choice) -> dict[str, Any]:
    """A line of the table."""
    return {**dataclasses.asdict(shape), **dataclasses.asdict(choice.tile), "splits": choice.splits}


def merged(data: dict[str, Any], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table with these lines in the place of those for the same weights on the same GPU."""
    keys = ("device", "bits", "n", "k")
    new = {tuple(line[key] for key in keys) for line in found}
    kept = [line for line in data["measured"] if tuple(line[key] for key in keys) not in new]
    lines = sorted([*kept, *found], key=lambda line: [line[key] for key in (*keys, "most")])
    return {"general": data["general"], "measured": lines}


def text(data: dict[str, Any]) -> str:
    """The table as the file holds it, a line for each entry."""
    parts = []
    for name in ("general", "measured"):
        lines = ",\n".join("    " + json.dumps(line) for line in data[name])
        parts.append(f'  "{name}": [\n{lines}\n  ]' if lines else f'  "{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def compiled(planes: Sequence[Sequence[Tensor]], scheme: str, x: Tensor, choice: Choice) -> torch.cuda.CUDAGraph:
    """One call on every copy of the weight, by this choice, in a graph."""
    n = planes[0][0].shape[0]

    def call(x: Tensor, own: list[Tensor]) -> Tensor:
        y: Tensor = torch.ops.fxquant.linear(x, own, [], scheme, [n], ABI)
        return y

    torch._dynamo.reset()
    fn = torch.compile(call, dynamic=False, options={"fx_graph_cache": False})
    with mock.patch.object(lowering_tiles, "choices", return_value=(choice,)):
        y = fn(x, list(planes[0]))
    weight = codecs.dequantize(_named(planes[0], scheme, n, x.shape[1]), Scheme.parse(scheme), n, x.shape[1]).double()
    exact, size = F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())
    if not bool(((y.double() - exact).abs() <= 2 * torch.finfo(x.dtype).eps * size + 1e-6).all()):
        raise SystemExit(f"{choice} is wrong for {scheme} {n} x {x.shape[1]} and {len(x)} rows")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for own in planes:
            fn(x, list(own))
    return graph


def _named(planes: Sequence[Tensor], scheme: str, n: int, k: int) -> dict[str, Tensor]:
    return dict(zip(Scheme.parse(scheme).planes(n, k), planes, strict=True))


def seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def best(spelling: str, n: int, k: int, m: int, rounds: int) -> Choice:
    """The choice with the least median."""
    scheme = Scheme.parse(spelling)
    weight = torch.randn(n, k, device="cuda")
    planes = list(codecs.quantize(weight, scheme, "absmax").values())
    copies = math.ceil(BYTES / scheme.nbytes(n, k))
    every = [[plane.clone() for plane in planes] for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    graphs = {}
    for choice in (Choice(tile, splits) for tile in tiles() for splits in (1, 2, 4, 8)):
        if k // choice.tile.depth % (choice.splits or 1) == 0:
            try:
                graphs[choice] = compiled(every, spelling, x, choice)
            except (RuntimeError, torch._dynamo.exc.BackendCompilerFailed) as error:
                sys.stderr.write(f"{choice}: {str(error).splitlines()[0]}\n")  # too much shared memory, say
    times: dict[Choice, list[float]] = {choice: [] for choice in graphs}
    for _ in range(rounds):
        for choice, graph in graphs.items():
            times[choice].append(seconds(graph.replay))
    return min(times, key=lambda choice: statistics.median(times[choice]))


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.cuda.get_device_name()
    for spelling, (n, k), m in itertools.product(options.scheme, options.shape or SHAPES, options.rows):
        choice = best(spelling, n, k, m, options.rounds)
        print(f"{spelling} {n} x {k}, {m} rows: {choice}", flush=True)
        yield entry(Shape(device, Scheme.parse(spelling).spec.bits, n, k, m), choice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 128, 192])
    parser.add_argument("--scheme", nargs="+", default=["int4-g128", "int8"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"tune_tiles: there is no CUDA GPU here, so nothing was measured; {options.out} is as it was")
    data = merged(json.loads(TABLE.read_text(encoding="utf-8")), list(lines(options)))
    parse(data)
    options.out.write_text(text(data), encoding="utf-8")
    print(f"wrote {options.out}; raise ABI in fxquant/ops.py, or compiled graphs keep the old tiles")


if __name__ == "__main__":
    main()
