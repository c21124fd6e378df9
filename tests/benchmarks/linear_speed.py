"""Few rows times a weight on a CPU: the op on planes beside oneDNN's bfloat16, ATen's int4 and bitsandbytes.

    python tests/benchmarks/linear_speed.py [--rows 1 4 8 16] [--shape 4096 4096] [--rounds 15] [--json FILE]
    python tests/benchmarks/linear_speed.py --experts [--rows 1 8 64 256] ...

bfloat16 inputs. Every method runs once in every round, each on the next of so many copies of its weight that they take
128 MB together, so that other load meets all of them and no cache holds them. Ratios are to the fastest rival of the
same round (of the same numbers of rows): their median, least and most. Before any ratio is printed, what a method gives
is compared with float64.

With `--experts`, one layer of 128 experts, 8 to a token, 2048 to 768 and back, against transformers' three ways.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxquant import codecs, native
from fxquant.ops import ABI
from fxquant.scheme import Scheme

SCHEMES = ("int4", "nf4", "nf4-dq", "q4_k", "mxfp4", "int8", "fp8")
EXPERTS, TOP, HIDDEN, INNER = 128, 8, 2048, 768
STEP = 2.0**-8
"""Half the distance from 1 to the next larger bfloat16."""


@dataclass
class Method:
    """One way to compute, with copies of its weight, and how long it took in each round."""

    name: str
    copies: list[Callable[[Tensor], Tensor]]
    weight: Tensor
    """What the first copy stands for, float32."""
    rival: bool = True
    seconds: list[float] = field(default_factory=list)
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
        Method(f"{spelling}, native.linear", [function(p) for p in planes], decoded, rival=False),
        Method(spelling, [op(list(p.values())) for p in planes], decoded, rival=False),
        Method(f"{spelling}, decoded first", [plain(p) for p in planes[:2]], decoded, rival=False),
    ]


def onednn(weight: Tensor, megabytes: float) -> Method:
    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    count = copies_of(2 * weight.numel(), megabytes)
    return Method("oneDNN bfloat16, packed", [copy() for _ in range(count)], weight.float())


def aten(weight: Tensor, megabytes: float) -> Method:
    scheme, (n, k) = Scheme.parse("int4-g128"), weight.shape
    planes = codecs.quantize(weight, scheme, "absmax")
    fields = codecs.decode.unpack(planes["codes"], 4, k).to(torch.int32)
    scales = torch.stack((planes["scales"], torch.zeros_like(planes["scales"])), -1).transpose(0, 1).contiguous()

    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)

    decoded = codecs.dequantize(planes, scheme, n, k)
    return Method("ATen int4", [copy() for _ in range(copies_of(n * k // 2, megabytes))], decoded)


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
    return Method("bitsandbytes nf4", [first, *(copy() for _ in range(count - 1))], decoded)


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


class Layer:
    """One layer of experts in bfloat16, and its planes."""

    def __init__(self, spelling: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.spelling, self.scheme = spelling, Scheme.parse(spelling)
        config = Qwen3MoeConfig(
            num_experts=EXPERTS, num_experts_per_tok=TOP, hidden_size=HIDDEN, moe_intermediate_size=INNER
        )
        self.config, self.experts = config, Qwen3MoeExperts(config).bfloat16().requires_grad_(False)
        for parameter in (self.experts.gate_up_proj, self.experts.down_proj):
            parameter.normal_(std=0.02)
        self.planes = {}
        for name in ("gate_up_proj", "down_proj"):
            stacks = [codecs.quantize(weight, self.scheme, "absmax") for weight in getattr(self.experts, name)]
            self.planes[name] = {plane: torch.stack([each[plane] for each in stacks]) for plane in stacks[0]}

    def ours(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate_up = native.experts(x, ids, self.planes["gate_up_proj"], self.scheme, 2 * INNER, None)
        assert gate_up is not None
        gate, up = gate_up.chunk(2, -1)
        y = native.experts(F.silu(gate) * up, ids, self.planes["down_proj"], self.scheme, HIDDEN, None)
        assert y is not None
        return (y.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def theirs(self, how: str) -> Callable[..., Tensor]:
        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            self.config._experts_implementation = how
            return self.experts(x, ids, weights)

        return run

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """With the weights that the planes stand for, rounded to bfloat16, in the place of the original ones."""
        kept = {name: getattr(self.experts, name).clone() for name in self.planes}
        for name, planes in self.planes.items():
            parameter = getattr(self.experts, name)
            for i in range(EXPERTS):
                own = {plane: values[i] for plane, values in planes.items()}
                parameter[i] = codecs.dequantize(own, self.scheme, *parameter.shape[1:], torch.bfloat16)
        yield
        for name, weight in kept.items():
            getattr(self.experts, name).copy_(weight)


def experts(tokens: Sequence[int], spelling: str, rounds: int) -> dict[int, list[Method]]:
    layer, found = Layer(spelling), {}
    names = {"eager": "eager loop", "batched_mm": "batched_mm", "grouped_mm": "grouped_mm"}
    for count in tokens:
        methods = [Method(spelling, [], torch.empty(0), rival=False)]
        methods += [Method(f"transformers {name}", [], torch.empty(0)) for name in names.values()]
        runs = [layer.ours, *(layer.theirs(how) for how in names)]
        with layer.decoded():
            arguments = routed(count)
            reference, y = runs[1](*arguments).float(), layer.ours(*arguments).float()
        if (y - reference).norm() > 0.02 * reference.norm():
            sys.exit(f"experts, {count} tokens: not correct, so no speeds")
        for _ in range(rounds):
            arguments = routed(count)
            for method, run in zip(methods, runs, strict=True):
                start = time.perf_counter()
                run(*arguments)
                method.seconds.append(time.perf_counter() - start)
        found[count] = methods
    return found


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.rand(tokens, EXPERTS).softmax(-1)
    weights, ids = scores.topk(TOP)
    return torch.randn(tokens, HIDDEN).bfloat16(), ids, (weights / weights.sum(-1, keepdim=True)).bfloat16()


def report(methods: list[Method], rows: int, console: Console) -> list[dict[str, object]]:
    rivals = [method for method in methods if method.rival]
    best = [min(times) for times in zip(*(rival.seconds for rival in rivals), strict=True)]
    table = Table(f"{rows} rows", "ms", "x best rival", "least", "most", *(f"x {r.name}" for r in rivals), box=None)
    lines: list[dict[str, object]] = []
    for method in methods:
        ratios = [other / own for other, own in zip(best, method.seconds, strict=True)]
        medians = {
            rival.name: statistics.median(a / b for a, b in zip(rival.seconds, method.seconds, strict=True))
            for rival in rivals
        }
        middle = statistics.median(ratios)
        numbers = [f"{v:.2f}" for v in (middle, min(ratios), max(ratios), *medians.values())]
        table.add_row(method.name, f"{1e3 * statistics.median(method.seconds):.3f}", *numbers)
        lines.append(
            {"rows": rows, "method": method.name, "seconds": method.seconds, "ratio": middle, "ratios": medians}
        )
    console.print(table)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", help="rows of x, or tokens")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), help="N and K")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--experts", action="store_true", help="a layer of experts, under the first of the schemes")
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
        if options.experts:
            for tokens, methods in experts(options.rows or (1, 8, 64, 256), options.schemes[0], options.rounds).items():
                lines += report(methods, tokens, console)
        else:
            methods = linears(options.shape, options.schemes, options.megabytes)
            for rows in options.rows or (1, 4, 8, 16):
                if found := wrong(methods, rows, options.shape[1]):
                    sys.exit("not correct, so no speeds:\n  " + "\n  ".join(found))
                x = torch.randn(rows, options.shape[1]).bfloat16()
                for method in methods:
                    method.seconds.clear()
                for _ in range(options.rounds):
                    for method in methods:
                        method.run(x)
                lines += report(methods, rows, console)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
