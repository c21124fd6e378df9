"""Every scheme beside the libraries that have one of its kind: bits, error, perplexity, speed of quantizing.

    python tests/benchmarks/scheme_table.py [--markdown] [--check] [--json FILE] [--windows 64]
                                            [--libraries bitsandbytes torchao ...] [--ggml libggml.so]

Error is the relative squared error `|W - W'|^2 / |W|^2` in percent, on weights that bfloat16 holds: normal, Student-t
with 5 degrees of freedom, and normal with 1 % of the columns ten times as large. Perplexity is that of the trained
model `tests/data/code-dense` with all its linears replaced by what a quantizer makes of them, computed in float32;
schemes that quantize activations run as they are. Speed is in million weights per second on one core, the best of
several runs on a bfloat16 weight. A reference stands below the scheme of ours that has its kind and no more bits.
`--check` fails where a reference is more accurate than ours on any of the three weights, or an error above its limit.
llama.cpp's K-quants need its C library: `--ggml` names one, built with `ggml_quantize_chunk` in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import reference_quantizers
import torch
from perplexity_table import load
from reference_quantizers import LIBRARIES, Reference
from rich.progress import track
from torch import Tensor, nn

import fxquant
from fxquant.codecs import dequantize, quantize
from fxquant.linears import find_linears
from fxquant.perplexity import perplexity
from fxquant.scheme import NAMES, Scheme
from fxquant.tables import Table

SCHEMES = (
    "int8", "int8-bf16", "int8-tensor", "int8-g64", "int6-g64", "int5-g64", "int4-g128", "int4-g64", "int4-g32",
    "int4-g128-asym", "int4-g64-asym", "int4-g128-perm", "uint4-g128-bias", "int3-g128", "int3-g64", "int2-g64",
    "uint2-g128-bias", *(f"uint{bits}-g64-fzero-fp16" for bits in (8, 4, 3, 2)), "table(-1,-0.3,0.3,1)-g64",
    "ternary-g64", "trit-g64", "bitnet", "nf4", "nf4-dq", "nf4-g64", "fp4", "fp8", "fp8-bf16", "fp8-tensor",
    "fp8-b128x128", "fp8e5m2", "mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e3m2", "mxfp4", "nvfp4",
    *(name for name in NAMES if name[0] in "qt" or name.startswith("iq")),
    "int8+int8", "llm-int8", "int4-g128+int8", "fp8+fp8", "fp8-b128x128+fp8-g128",
)  # fmt: skip
LIMITS = {"int4-g64": 0.81, "nf4-g64": 0.73, "int3-g64": 3.2, "int2-g64": 12.5}
"""The most error on normal weights, in percent."""
WEIGHTS = ("normal", "student-t", "outliers")


@dataclass
class Row:
    """One line of the table."""

    scheme: str
    by: str
    bits: float
    errors: dict[str, float] = field(default_factory=dict)
    """Percent, by the kind of weight."""
    perplexity: float | None = None
    speed: float | None = None
    """Million weights per second."""


def weights(n: int, k: int) -> dict[str, Tensor]:
    """Float32 weights whose values bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, k, generator=generator)
    chi = torch.randn(5, n, k, generator=generator).square().mean(0).sqrt()
    outliers = torch.randn(n, k, generator=generator)
    outliers[:, torch.randperm(k, generator=generator)[: k // 100]] *= 10
    student = torch.randn(n, k, generator=generator) / chi
    return {name: w.bfloat16().float() for name, w in zip(WEIGHTS, (normal, student, outliers), strict=True)}


def error(weight: Tensor, decoded: Tensor) -> float:
    """Relative squared error, percent."""
    return float(100 * (decoded.double() - weight).square().sum() / weight.double().square().sum())


def speed(encode: Callable[[], object], count: int, seconds: float = 0.5) -> float:
    """Million weights per second: the best of at least three runs."""
    encode()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or (spent < seconds and runs < 50):
        start = time.perf_counter()
        encode()
        taken = time.perf_counter() - start
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return count / best / 1e6


class Judge:
    """The weights, and the model and text, that all rows are measured on."""

    def __init__(self, windows: int) -> None:
        self.weights = weights(512, 4096)
        self.fast = self.weights["normal"].bfloat16()
        self.windows = windows
        self.model, self.tokens = load() if windows else (nn.Module(), torch.empty(0))
        self.names = [linear.name for linear in find_linears(self.model) if "lm_head" not in linear.name]

    def perplexity(self, roundtrip: Callable[[Tensor], Tensor] | None) -> float | None:
        """With every linear's weight replaced by what the function makes of it."""
        if not self.windows:
            return None
        model = copy.deepcopy(self.model)
        for name in self.names if roundtrip else ():
            weight = model.get_submodule(name).get_parameter("weight")
            assert roundtrip is not None
            weight.data = roundtrip(weight.data)
        return perplexity(model, self.tokens, 256, self.windows)

    def ours(self, spelling: str) -> Row:
        """A scheme of ours, scales with the least squared error."""
        scheme = Scheme.parse(spelling)
        row = Row(spelling, "fxquant", scheme.bits_per_weight(4096, 4096))
        if not scheme.encodable:
            return row

        def roundtrip(weight: Tensor) -> Tensor:
            return dequantize(quantize(weight, scheme), scheme, *weight.shape)

        row.errors = {name: error(weight, roundtrip(weight)) for name, weight in self.weights.items()}
        row.speed = speed(lambda: quantize(self.fast, scheme), self.fast.numel())
        if scheme.activation is None and self._fits(scheme):
            row.perplexity = self.perplexity(roundtrip)
        elif self.windows and self._fits(scheme):
            quantized = fxquant.quantize(copy.deepcopy(self.model), spelling, progress=False)
            row.perplexity = perplexity(quantized, self.tokens, 256, self.windows)
        return row

    def _fits(self, scheme: Scheme) -> bool:
        shapes = [self.model.get_submodule(name).get_parameter("weight").shape for name in self.names]
        return all(scheme.misfit(n, k) is None for n, k in shapes)

    def theirs(self, reference: Reference) -> Row:
        """What a library makes of the same weights."""
        row = Row(reference.method, reference.library, reference.bits)
        row.errors = {name: error(weight, reference.encode(weight)()) for name, weight in self.weights.items()}
        row.perplexity = self.perplexity(lambda weight: reference.encode(weight)())
        given = self.fast if reference.takes_bf16 else self.fast.float()
        row.speed = speed(lambda: reference.encode(given), self.fast.numel())
        return row


def measure(names: list[str], ggml: Path | None, windows: int) -> list[list[Row]]:
    """Groups of rows: one of ours, and the references that it is compared with."""
    torch.set_num_threads(1)
    judge, found = Judge(windows), reference_quantizers.references(names, ggml)
    groups = [[Row("bf16", "the model", 16.0, perplexity=judge.perplexity(None))]] if windows else []
    missing = {reference.ours for reference in found} - set(SCHEMES)
    for spelling in track([*SCHEMES, *sorted(missing)], "schemes", transient=True):
        groups.append([judge.ours(spelling), *(judge.theirs(r) for r in found if r.ours == spelling)])
    return groups


def failures(groups: list[list[Row]]) -> list[str]:
    """Where a reference is more accurate, or an error above its limit."""
    found = []
    for ours, *others in groups:
        limit = LIMITS.get(ours.scheme)
        if limit is not None and ours.errors["normal"] > limit:
            found.append(f"{ours.scheme}: {ours.errors['normal']:.3f} % on normal weights, at most {limit} are allowed")
        for other in others:
            if ours.bits > other.bits * 1.0001:
                found.append(f"{ours.scheme} has {ours.bits:.4f} bits, {other.by}'s {other.scheme} {other.bits:.4f}")
            found += [
                f"{ours.scheme}: {ours.errors[kind]:.4f} % on {kind}, {other.by}'s {other.scheme} {theirs:.4f} %"
                for kind, theirs in other.errors.items()
                if ours.errors[kind] > theirs
            ]
    return found


COLUMNS = ("scheme", "by", "bits", *(f"{name} %" for name in WEIGHTS), "perplexity", "Mweights/s")


def cells(row: Row, baseline: float | None) -> tuple[str, ...]:
    """A row as text."""
    errors = [f"{row.errors[kind]:#.3g}" if row.errors else "" for kind in WEIGHTS]
    change = ""
    if row.perplexity is not None and baseline is not None:
        change = f"{row.perplexity:.3f}" if row.by == "the model" else f"{100 * (row.perplexity / baseline - 1):+.2f} %"
    return (row.scheme, row.by, f"{row.bits:.4g}", *errors, change, f"{row.speed:.3g}" if row.speed else "")


def markdown(lines: list[tuple[str, ...]]) -> str:
    """The table in Markdown."""
    head = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines])


def main() -> int:
    """Print the table; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--check", action="store_true", help="fail where a reference is more accurate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    parser.add_argument("--windows", type=int, default=64, help="windows of text for the perplexity; 0: none")
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--ggml", type=Path, metavar="FILE", help="ggml's C library, for K-quants")
    options = parser.parse_args()
    for name in options.libraries:
        if not reference_quantizers.installed(name):
            print(f"{name} is not installed: its rows are left out", file=sys.stderr)
    names = [name for name in options.libraries if reference_quantizers.installed(name)]
    groups = measure(names, options.ggml, options.windows)
    baseline = groups[0][0].perplexity
    lines = [cells(row, baseline) for group in groups for row in group]
    if options.json:
        options.json.write_text(json.dumps([[asdict(row) for row in group] for group in groups], indent=1))
    table = Table("every scheme", COLUMNS, tuple(lines), right=frozenset(range(2, len(COLUMNS))))
    print(markdown(lines) if options.markdown else table)
    failed = failures(groups) if options.check else []
    for failure in failed:
        print(failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
