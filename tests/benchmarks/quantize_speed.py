"""Quantizing on a CPU: million weights per second, ours (compiled, and in plain torch) beside other libraries.

    python tests/benchmarks/quantize_speed.py [--size 4096] [--rounds 7] [--threads 1] [--schemes ...] [--json FILE]

One bfloat16 weight `[size, size]`, normal. Every method runs once in every round, after one run to warm up, so that
other load meets all of them; ratios are to bitsandbytes' `quantize_4bit` (nf4, blocks of 64) of the same round: their
median, least and most. What a method stores is decoded and compared with the weight before any ratio is printed: the
compiled codecs against plain torch, the others against a bound on the error. Plain torch runs on a quarter of the rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxquant import codecs, native
from fxquant.scheme import Scheme

SCHEMES = (
    *("int4", "uint4-g64", "int8", "nf4", "mxfp4", "fp8", "uint4-g64-fzero-fp16", "q4_1", "nf4-dq", "nvfp4"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
)
LARGEST = {8: 0.002, 6: 0.002, 5: 0.002, 4: 0.016, 3: 0.05, 2: 0.25}
"""Relative squared error that no method may exceed, by bits of a code, for normal weights."""
BASELINE = "bitsandbytes nf4"


@dataclass
class Method:
    """One way to quantize, and how fast it was in each round."""

    name: str
    run: Callable[[Tensor], Callable[[], Tensor]]
    bits: int
    share: float = 1.0
    rates: list[float] = field(default_factory=list)
    error: float = math.nan


def ours(spelling: str, search: codecs.ScaleSearch, compiled: bool) -> Method:
    scheme = Scheme.parse(spelling)

    def run(weight: Tensor) -> Callable[[], Tensor]:
        with native.from_size(0 if compiled else math.inf):
            planes = codecs.quantize(weight, scheme, search)
        return lambda: codecs.dequantize(planes, scheme, *weight.shape)

    how = "compiled" if compiled else "plain torch"
    return Method(f"{spelling} {search}, {how}", run, scheme.spec.bits, 1.0 if compiled else 0.25)


def bitsandbytes() -> list[Method]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def run(weight: Tensor) -> Callable[[], Tensor]:
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return lambda: dequantize_4bit(packed, state).float()

    return [Method(BASELINE, run, 4)]


def torchao() -> list[Method]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    def method(name: str, config: object, bits: int) -> Method:
        def run(weight: Tensor) -> Callable[[], Tensor]:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            quantize_(linear, config)
            return lambda: linear.weight.dequantize().float()

        return Method(f"torchao {name}", run, bits)

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))
    return [method("int8", Int8WeightOnlyConfig(), 8), method("int4 g128", int4, 4)]


def hqq() -> list[Method]:
    from hqq.core.quantize import Quantizer

    def run(weight: Tensor) -> Callable[[], Tensor]:
        packed, meta = Quantizer.quantize(
            weight, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return lambda: Quantizer.dequantize(packed, meta).float()

    return [Method("hqq 4 bits g64", run, 4, 0.25)]


def libraries() -> list[Method]:
    methods = []
    for name, make in (("bitsandbytes", bitsandbytes), ("torchao", torchao), ("hqq", hqq)):
        if importlib.util.find_spec(name):
            with redirect_stderr(StringIO()):
                methods += make()
    return methods


def measure(methods: list[Method], weight: Tensor, rounds: int) -> None:
    for method in methods:
        part = weight[: max(int(len(weight) * method.share), 1)]
        decoded = method.run(part)().view(part.shape)
        method.error = ((decoded - part.float()).double().square().sum() / part.double().square().sum()).item()
    for _ in range(rounds):
        for method in methods:
            part = weight[: max(int(len(weight) * method.share), 1)]
            start = time.perf_counter()
            method.run(part)
            method.rates.append(part.numel() / (time.perf_counter() - start) / 1e6)


def problems(methods: list[Method], schemes: Sequence[str]) -> list[str]:
    """What is not correct, and so has no speed worth reporting."""
    found = [f"{m.name}: error {m.error:.4f}" for m in methods if not m.error <= LARGEST[m.bits]]
    errors = {method.name: method.error for method in methods}
    weight = torch.randn(64, 1024).bfloat16()
    for spelling in schemes:
        scheme, planes = Scheme.parse(spelling), []
        for size in (0, math.inf):
            with native.from_size(size):
                planes.append(codecs.quantize(weight, scheme, "absmax"))
        if not all(torch.equal(plane, planes[1][name]) for name, plane in planes[0].items()):
            found.append(f"{spelling} absmax: the compiled planes are not those of plain torch")
        least, absmax = (errors[f"{spelling} {search}, compiled"] for search in ("least_squares", "absmax"))
        if least > absmax:
            found.append(f"{spelling} least_squares: error {least:.4f}, and absmax has {absmax:.4f}")
    return found


def report(methods: list[Method], console: Console) -> list[dict[str, object]]:
    base = next((method for method in methods if method.name == BASELINE), None)
    table = Table("method", "bits", "error %", "Mw/s", f"x {BASELINE}", "least", "most", box=None)
    table.columns[0].no_wrap = True
    rows = []
    for method in sorted(methods, key=lambda m: -statistics.median(m.rates)):
        ratios = [a / b for a, b in zip(method.rates, base.rates, strict=True)] if base else []
        middle = statistics.median(ratios) if ratios else math.nan
        span = (f"{min(ratios):.2f}", f"{max(ratios):.2f}") if ratios else ("", "")
        rate = statistics.median(method.rates)
        table.add_row(method.name, f"{method.bits}", f"{100 * method.error:.4f}", f"{rate:.0f}", f"{middle:.2f}", *span)
        entry = {name: value for name, value in asdict(method).items() if name != "run"}
        rows.append({**entry, "median": rate, "ratio": middle, "ratios": ratios})
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES, help="those of ours")
    parser.add_argument("--json", type=Path, help="write every rate and ratio there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    searches: tuple[codecs.ScaleSearch, ...] = ("absmax", "least_squares")
    methods = [
        ours(s, search, how) for s in options.schemes for search in searches for how in (True, False)
    ] + libraries()
    weight = torch.randn(options.size, options.size).bfloat16()
    measure(methods, weight, options.rounds)
    if wrong := problems(methods, options.schemes):
        sys.exit("not correct, so no speeds:\n  " + "\n  ".join(wrong))
    versions = f"torch {torch.__version__}, {options.threads} threads, {options.size} x {options.size}"
    console.print(f"{versions}, {options.rounds} rounds")
    rows = report(methods, console)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "methods": rows}, indent=1))


if __name__ == "__main__":
    main()
