"""Plan, capture and quantize a tiny random model of every causal LM configuration of transformers, and of 57 others.

    python tests/benchmarks/sweep.py [types ...] [--recipe int8] [--equal] [--markdown] [--chunk 20]

Types run in chunks, each in an interpreter of its own, so that one crash does not end the sweep. The error is the
relative distance between the model's first output (logits) before and after `quantize`, in float32; the op error that
between the quantized model and the same model with its weights dequantized. With `--equal` the captured graph's outputs
are compared with the model's.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils import _pytree as pytree

from fxquant import dataflow, dequantize, plan, quantize
from fxquant.errors import CaptureError
from fxquant.example_inputs import example_inputs
from fxquant.graph_capture import capture
from fxquant.linears import find_linears, find_stacked
from fxquant.plans import Plan, PlanEntry

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from expert_architectures import expert_weights, experts_of
from tiny_models import OTHER_MODELS, causal_lm_types, tiny_model

LONGEST = 240  # characters of a reason
COLUMNS = (
    "model",
    "result",
    "linears",
    "called",
    "stacked",
    "bare",
    "quantized",
    "accounted",
    "error",
    "kept",
    "seconds",
)
LARGEST = 0.03
"""The relative error of int8 that needs no explanation."""


def measure(kind: str, auto_class: str, compare: bool, recipe: str) -> dict[str, Any]:
    """One row: what became of one configuration."""
    start = time.perf_counter()
    row = _captured(kind, auto_class, compare)
    model = row.pop("module", None)
    if model is not None:
        try:
            row |= _quantized(model, row.pop("call", None), recipe)
        except Exception as error:
            row["result"] += f"; not quantized: {type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _quantized(model: torch.nn.Module, call: Any, recipe: str) -> dict[str, Any]:
    """Plan and quantize; what the plan accounts for is counted here anew, from the modules' own parameters."""
    planned = plan(model, recipe)
    weights = _weights(model)
    kept = {e.reason for e in planned.kept if e.kind == "linear"}
    args, kwargs = call if call is not None else ((), example_inputs(model))
    try:
        before = _first_output(model, args, kwargs)
    except Exception as error:  # sizes that the rules for tiny configurations got wrong
        return {"result": f"not built: its forward fails at this size: {error}"}
    owners = dict.fromkeys(_owner(entry) for entry in planned.quantized)
    original = {name: model.get_parameter(name).detach() for owner in owners for name in weights[owner]}
    accounted = _accounted(planned, weights)
    quantize(model, recipe, progress=False)
    after = _first_output(model, args, kwargs)
    dequantize(model)
    row = {
        "quantized": len(planned.quantized),
        "accounted": f"{math.floor(100 * accounted)}%",
        "error": _distance(after, before),
        "op error": _distance(after, _first_output(model, args, kwargs)),
        "kept": "; ".join(sorted(kept)),
    }
    if row["error"] > LARGEST:  # is it the scheme or the model? what random noise of 1 % on the weights does tells
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in original.items():
                noise = 1 + 0.01 * torch.randn(weight.shape, generator=generator)
                model.get_parameter(name).copy_(weight * noise)
        row["noise"] = _distance(_first_output(model, args, kwargs), before)
    return row


def _weights(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Linears and modules of stacked experts, by name: their parameters with the number of elements."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            found[name] = {f"{name}.weight": math.prod(module.weight.shape)}
    for name, module in experts_of(model).items():
        if not any(linear.startswith(f"{name}.") for linear in found):
            stacks = expert_weights(module)
            found[name] = {f"{name}.{leaf}": math.prod(shape) for leaf, shape in stacks.items()}
    return found


def _accounted(planned: Plan, weights: dict[str, dict[str, int]]) -> float:
    """The share of all elements that has an entry in the plan, quantized or kept."""
    here: dict[str, int] = collections.Counter()
    for entry in planned.entries:
        for name in {_owner(entry), *entry.aliases} & set(weights):
            here[name] += math.prod(entry.shape)
    sizes = {name: sum(held.values()) for name, held in weights.items()}
    return sum(min(here[name], size) for name, size in sizes.items()) / max(sum(sizes.values()), 1)


def _owner(entry: PlanEntry) -> str:
    return entry.name.rsplit(".", 2)[0] if entry.kind == "expert" else entry.name


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _first_output(model: torch.nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return next(t for t in _tensors(model(*args, **kwargs)) if t.is_floating_point()).double()


def _captured(kind: str, auto_class: str, compare: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"model": kind if auto_class == "AutoModelForCausalLM" else f"{kind} ({auto_class})"}
    try:
        model = tiny_model(kind, auto_class)
    except Exception as error:
        return row | {"result": f"not built: {type(error).__name__}: {error}"}
    sites = find_linears(model)
    row |= {"linears": len(sites), "stacked": len(find_stacked(model)), "result": "captured", "module": model}
    try:
        gm = capture(model)
    except CaptureError as error:
        return row | {"result": f"not captured: {error}"}
    row["call"] = gm.meta["example_inputs"]
    row["called"] = len(sites) - len(dataflow.uncalled(gm, sites))
    row["bare"] = len(dataflow.bare_matmuls(gm, sites))
    return row | {"result": _compared(model, gm)} if compare else row


def _compared(model: torch.nn.Module, gm: torch.fx.GraphModule) -> str:
    args, kwargs = gm.meta["example_inputs"]
    with torch.no_grad():
        wanted, got = _tensors(model(*args, **kwargs)), _tensors(gm(*args, **kwargs))
    if len(wanted) < len(got) or any(a.shape != b.shape for a, b in zip(wanted, got, strict=False)):
        return "captured, other outputs"
    if all(torch.equal(a, b) for a, b in zip(wanted, got, strict=False)):
        return "captured, equal"
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(wanted, got, strict=False))
    return f"captured, off by {worst:.1e}"


def _tensors(output: Any) -> list[torch.Tensor]:
    # Caches are no part of the graph's outputs, and come last.
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [value for value in leaves if isinstance(value, torch.Tensor)]


def worker(models: list[tuple[str, str]], compare: bool, recipe: str) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for kind, auto_class in models:
        print(json.dumps(measure(kind, auto_class, compare, recipe)), flush=True)


def sweep(models: list[tuple[str, str]], chunk: int, compare: bool, recipe: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(0, len(models), chunk):
        part = models[i : i + chunk]
        while part:
            command = [sys.executable, __file__, "--worker", json.dumps(part), "--recipe", recipe]
            command += ["--equal"] if compare else []
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if len(found) < len(part):
                found.append({"model": part[len(found)][0], "result": f"crashed: exit status {done.returncode}"})
            rows += found
            part = part[len(found) :]
            print(f"{len(rows)} of {len(models)}", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS, title="Tiny random models")
    for row in rows:
        shown = row | {key: f"{row[key]:.2%}" for key in ("error", "op error") if key in row}
        table.add_row(*(escape(" ".join(str(shown.get(column, "")).split())[:LONGEST]) for column in COLUMNS))
    console = Console(width=220)
    console.print(table)
    for line in summary(rows):
        console.print(": ".join(line))


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the sweep shows, as pairs of a question and its answer."""
    built = [row for row in rows if not str(row["result"]).startswith("not built")]
    dense = [row for row in built if not row.get("stacked")]
    stacked = [row for row in built if row.get("stacked")]
    done = [row for row in built if "error" in row]
    exact = [row for row in done if row["error"] <= LARGEST]

    def share(part: list[Any], whole: list[Any]) -> str:
        return f"{len(part)} of {len(whole)} ({len(part) / max(len(whole), 1):.1%})"

    def captured(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in part if str(row["result"]).startswith("captured")]

    def named(part: list[dict[str, Any]], field: str) -> str:
        return "; ".join(f"{row['model']} ({_short(row, field)})" for row in part) or "none"

    return [
        ("configurations that transformers builds at this size", share(built, rows)),
        (
            "every linear weight and expert stack in the plan",
            share([r for r in done if r["accounted"] == "100%"], done),
        ),
        ("dense models captured as one graph", share(captured(dense), dense)),
        ("mixture-of-experts models captured as one graph", share(captured(stacked), stacked)),
        ("quantized", share(done, built)),
        (f"relative error of the logits at most {LARGEST:.0%}", share(exact, done)),
        ("above that (in brackets: what 1 % noise on the weights does)", _sensitive(done)),
        ("largest distance from the same model with dequantized weights", f"{max(r['op error'] for r in done):.1e}"),
        ("not captured", named([row for row in built if row not in captured(built)], "result")),
        ("not built", named([row for row in rows if row not in built], "result")),
    ]


def _sensitive(rows: list[dict[str, Any]]) -> str:
    above = [row for row in rows if row["error"] > LARGEST]
    return "; ".join(f"{row['model']} {row['error']:.1%} ({row['noise']:.1%})" for row in above) or "none"


def _short(row: dict[str, Any], field: str) -> str:
    reason = str(row[field]).removeprefix("not built: ").rpartition("as one graph: ")[2]
    return textwrap.shorten(reason, 100, placeholder=" ...")


def markdown(rows: list[dict[str, Any]], recipe: str) -> str:
    lines = [f"| tiny random models, `{recipe}` | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {question} | {answer} |" for question, answer in summary(rows))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, or type:AutoClass; default: all")
    parser.add_argument("--equal", action="store_true", help="compare the graph's outputs with the model's")
    parser.add_argument("--chunk", type=int, default=20, help="models per interpreter")
    parser.add_argument("--recipe", default="int8", help="what to quantize to")
    parser.add_argument("--markdown", action="store_true", help="print the summary as the README shows it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker), arguments.equal, arguments.recipe)
        return
    known = [*((kind, "AutoModelForCausalLM") for kind in causal_lm_types()), *OTHER_MODELS]
    named = [(t.partition(":")[0], t.partition(":")[2] or "AutoModelForCausalLM") for t in arguments.types]
    rows = sweep(named or known, arguments.chunk, arguments.equal, arguments.recipe)
    show(rows)
    if arguments.markdown:
        print(markdown(rows, arguments.recipe))


if __name__ == "__main__":
    main()
