"""What each scheme does to a trained language model: the tables of the README.

    python tests/benchmarks/perplexity_table.py [--model code-moe] [--markdown] [--check] [--windows 494]
                                                [--schemes int8 nf4 ...]

The models are `tests/data/code-dense` and `tests/data/code-moe`, a mixture of 8 experts of which each token takes 2,
trained and stored in bfloat16; the text is `tests/data/heldout.txt`, which they never saw, in windows of 256 tokens.
All rows compute in float32: the baseline is the bfloat16 weights, and a quantized row is the planes made from these
weights, dequantized to float32. So rows differ by the weights alone, not by rounding on the way. lm_head, embeddings
and norms stay as they are. `--check` fails where a scheme costs more than it may.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fxquant
from fxquant.install import record_of
from fxquant.model_report import report
from fxquant.perplexity import load_tokens, perplexity
from fxquant.pretrained import load_tokenizer
from fxquant.tables import Table

DATA = Path(__file__).parents[1] / "data"
WINDOW = 256
SCHEMES = {
    "code-dense": (
        *("int8", "int8+int8", "fp8", "int5-g64", "nf4", "nf4-dq", "int4-g128", "int4-g64", "int4-g32"),
        *("int4-g128-asym", "int4-g64-asym", "nvfp4", "mxfp4", "q4_k", "int3-g64", "int2-g64"),
    ),
    "code-moe": ("int8", "nf4", "int4-g64", "int4-g32", "mxfp4"),
}
"""Model: its rows."""
LIMITS = {
    "code-dense": {"int8": 0.1, "nf4": 1.0, "int4-g64": 1.5, "int4-g128": 1.5, "int3-g64": 6.0},
    "code-moe": {"int8": 0.1, "nf4": 1.5, "int4-g64": 1.5},
}
"""Model and scheme: the most that it may raise perplexity, in percent."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    scheme: str
    scale: str
    bits: float
    perplexity: float
    change: float
    """Against bf16, in percent."""
    seconds: float


def load(name: str = "code-dense") -> tuple[nn.Module, Tensor]:
    """A trained model with float32 copies of its bfloat16 weights, and the tokens of the held-out text."""
    source = DATA / name
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    return model, load_tokens(load_tokenizer(source), (DATA / "heldout.txt").read_text(encoding="utf-8"))


def measure(model: nn.Module, tokens: Tensor, scheme: str, windows: int | None, baseline: float) -> Row:
    """Quantize a copy of the model and measure it; the scheme "bf16" measures the model as it is."""
    started = time.perf_counter()
    if scheme == "bf16":
        found = perplexity(model, tokens, WINDOW, windows)
        return Row(scheme, "-", 16.0, found, 0.0, time.perf_counter() - started)
    quantized = fxquant.quantize(copy.deepcopy(model), scheme, progress=False)
    record = record_of(quantized)
    assert record is not None
    rules = {entry.scale for entry in record.plan.quantized}
    found = perplexity(quantized, tokens, WINDOW, windows)
    change = 100 * (found / baseline - 1)
    seconds = time.perf_counter() - started
    return Row(scheme, ", ".join(sorted(rules)), report(quantized).bits_per_weight, found, change, seconds)


def measure_all(name: str, schemes: tuple[str, ...], windows: int | None) -> list[Row]:
    """The baseline and one row per scheme."""
    model, tokens = load(name)
    rows = [measure(model, tokens, "bf16", windows, 0.0)]
    for scheme in schemes:
        rows.append(measure(model, tokens, scheme, windows, rows[0].perplexity))
        print(f"{scheme}: {rows[-1].perplexity:.4f} in {rows[-1].seconds:.0f} s", file=sys.stderr)
    return rows


def failures(name: str, rows: list[Row]) -> list[str]:
    """What costs more than it may."""
    limits = LIMITS[name]
    return [
        f"{row.scheme} changes perplexity by {row.change:+.3f} %, allowed are {limits[row.scheme]} %"
        for row in rows
        if row.scheme in limits and not abs(row.change) <= limits[row.scheme]
    ]


COLUMNS = ("scheme", "scales", "bits per weight", "perplexity", "against bf16")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    change = "" if row.scheme == "bf16" else f"{row.change:+.2f} %"
    return (row.scheme, row.scale.replace("_", " "), f"{row.bits:.4g}", f"{row.perplexity:.3f}", change)


def markdown(rows: list[Row]) -> str:
    """The table as the README shows it."""
    lines = [COLUMNS, ("---", "---", "---:", "---:", "---:"), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print the table; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SCHEMES), default="code-dense")
    parser.add_argument("--markdown", action="store_true", help="print the table as the README shows it")
    parser.add_argument("--check", action="store_true", help="fail where a scheme costs more than it may")
    parser.add_argument("--windows", type=int, help="windows of 256 tokens, from the start; all where not given")
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME")
    options = parser.parse_args()
    rows = measure_all(options.model, tuple(options.schemes or SCHEMES[options.model]), options.windows)
    if options.markdown:
        print(markdown(rows))
    else:
        print(Table("perplexity", COLUMNS, tuple(map(cells, rows)), right=frozenset({2, 3, 4})))
    failed = failures(options.model, rows) if options.check else []
    for failure in failed:
        print(failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
