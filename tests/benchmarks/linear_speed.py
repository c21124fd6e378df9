"""Few rows times a weight on a CPU: the op on planes beside oneDNN's bfloat16, ATen's int4 and bitsandbytes.

    python tests/benchmarks/linear_speed.py [--rows 1 4 8 16] [--shape 4096 4096] [--rounds 15] [--json FILE]

bfloat16 inputs. Every method runs once in every round, each on the next of so many copies of its weight that they take
128 MB together, so that other load meets all of them and no cache holds them. Ratios are to the fastest rival of the
same round (of the same numbers of rows): their median, least and most. Before any ratio is printed, what a method gives
is compared with float64. `experts_speed.py` does the same for a layer of experts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from side_by_side import Timed, report
from torch import Tensor

from fxquant import codecs, native
from fxquant.ops import ABI
from fxquant.scheme import Scheme

SCHEMES = ("int4", "nf4", "nf4-dq", "q4_k", "mxfp4", "int8", "fp8")
STEP = 2.0**-8
"""Half the distance from 1 to the next larger bfloat16."""


@dataclass
class Method(Timed):
    """One way to compute, with copies of its weight."""

    copies: list[Callable[[Tensor], Tensor]]
    weight: Tensor
    """What the first copy stands for, float32."""
    calls: int = 0

    def run(self, x: Tensor) -> None:
        copy = self.copies[self.calls % len(self.copies)]
        self.calls += 1
        start = time.perf_counter()
        copy(x)
        self.seconds.append(time.perf_counter() - start)


def copies_of(nbytes: int, megabytes: float) -> int:
    return max(2, math.ceil(megabytes * 1e6 / nbytes))


def ours(spelling: str, weight: Tensor, megabytes: float) -> list[Method]:
    scheme, (n, k) = Scheme.parse(spelling), weight.shape
    first = codecs.quantize(weight, scheme, "absmax")
    decoded = codecs.dequantize(first, scheme, n, k)
    planes = [{name: p.clone() for name, p in first.items()} for _ in range(copies_of(scheme.nbytes(n, k), megabytes))]

    def op(held: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.fxquant.linear(x, held, [], spelling, [n], ABI)

    def plain(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, codecs.dequantize(held, scheme, n, k, x.dtype))

    def function(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = native.linear(x, held, scheme, n, None)
            assert y is not None
            return y

        return run

    return [
        Method(f"{spelling}, native.linear", False, [function(p) for p in planes], decoded),
        Method(spelling, False, [op(list(p.values())) for p in planes], decoded),
        Method(f"{spelling}, decoded first", False, [plain(p) for p in planes[:2]], decoded),
    ]


def onednn(weight: Tensor, megabytes: float) -> Method:
    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    count = copies_of(2 * weight.numel(), megabytes)
    return Method("oneDNN bfloat16, packed", True, [copy() for _ in range(count)], weight.float())


def aten(weight: Tensor, megabytes: float) -> Method:
    scheme, (n, k) = Scheme.parse("int4-g128"), weight.shape
    planes = codecs.quantize(weight, scheme, "absmax")
    fields = codecs.decode.unpack(planes["codes"], 4, k).to(torch.int32)
    scales = torch.stack((planes["scales"], torch.zeros_like(planes["scales"])), -1).transpose(0, 1).contiguous()

    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)

    decoded = codecs.dequantize(planes, scheme, n, k)
    return Method("ATen int4", True, [copy() for _ in range(copies_of(n * k // 2, megabytes))], decoded)


def bitsandbytes(weight: Tensor, megabytes: float) -> Method:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape

    def copy() -> Linear4bit:
        linear = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4")
        linear.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        return linear.to("cpu").eval()

    first = copy()
    decoded = dequantize_4bit(first.weight.data, first.weight.quant_state).float()
    count = copies_of(n * k // 2, megabytes)
    return Method("bitsandbytes nf4", True, [first, *(copy() for _ in range(count - 1))], decoded)


def linears(shape: Sequence[int], schemes: Sequence[str], megabytes: float) -> list[Method]:
    weight = torch.randn(*shape).mul_(0.02).bfloat16()
    methods = [method for spelling in schemes for method in ours(spelling, weight, megabytes)]
    methods += [onednn(weight, megabytes), aten(weight, megabytes)]
    if importlib.util.find_spec("bitsandbytes"):
        methods.append(bitsandbytes(weight, megabytes))
    return methods


def wrong(methods: list[Method], rows: int, k: int) -> list[str]:
    """Methods whose result is further from float64 than the roundings of a bfloat16 weight and result explain."""
    x = torch.randn(rows, k).bfloat16()
    found = []
    for method in methods:
        y = method.copies[0](x).double()
        reference, magnitude = x.double() @ method.weight.double().T, x.double().abs() @ method.weight.double().abs().T
        off = ((y - reference).abs() / magnitude).max().item()
        if not off <= 4 * STEP + k * 2.0**-24:
            found.append(f"{method.name}, {rows} rows: off by {off:.2e} of the sum of magnitudes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 4, 8, 16), help="of x")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), help="N and K")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=float, default=128, help="of copies of a weight")
    parser.add_argument("--json", type=Path, help="write every time and ratio there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console, lines = Console(width=None if sys.stdout.isatty() else 160), []
    versions = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads"
    console.print(f"{versions}, {options.rounds} rounds")
    with torch.inference_mode():
        methods = linears(options.shape, options.schemes, options.megabytes)
        for rows in options.rows:
            if found := wrong(methods, rows, options.shape[1]):
                sys.exit("not correct, so no speeds:\n  " + "\n  ".join(found))
            x = torch.randn(rows, options.shape[1]).bfloat16()
            for method in methods:
                method.seconds.clear()
            for _ in range(options.rounds):
                for method in methods:
                    method.run(x)
            lines += report(methods, rows, "rows", console)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
