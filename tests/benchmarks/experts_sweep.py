"""Quantize a tiny random model of every architecture of transformers that has experts, and compare.

    python tests/benchmarks/experts_sweep.py [architectures ...] [--recipes int8 nf4 ...] [--markdown] [--chunk 12]

Architectures are the folders of transformers' source in which a class holds experts. Each is built from its configs,
until a model was found for every such class that calls it in its forward. Then, for each recipe, and in float32:

* coverage: the elements of the expert weights, counted from the modules' own parameters, that have an entry in the
  plan, that it quantizes, and that are still there as floats behind it;
* op error: the relative distance of the first output (logits), and of the output of each module of experts, from those
  of the same model after `dequantize`, which computes with transformers' own classes and experts implementation;
* relative error: the distance of the first output from that in full precision.

Architectures run in chunks, each in an interpreter of its own, so that one crash does not end the sweep.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant.install import record_of

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from expert_architectures import architectures, built, expert_weights, experts_of, run

RECIPES = ("int8", "int4-g32", "nf4", "mxfp4")
BOUND = 1e-5
"""The largest op error. What is found is at most a tenth of that: the same products, summed in another order."""


def distance(got: Tensor, want: Tensor) -> float:
    """Relative to `want`; infinite where one of them is not finite."""
    found = float((got - want).norm() / want.norm())
    return found if math.isfinite(found) else math.inf


def measure(folder: str, recipes: tuple[str, ...] = RECIPES) -> dict[str, Any]:
    """What became of one architecture, by recipe: the worst of its models."""
    start = time.perf_counter()
    models, problem = built(folder)
    row: dict[str, Any] = {"architecture": folder, "models": [type(model).__name__ for model, _ in models]}
    row["recipes"] = {}
    for recipe in recipes if not problem else ():
        try:
            found = [quantized(copy.deepcopy(model), inputs, recipe) for model, inputs in models]
        except Exception as error:
            problem = f"{recipe}: {type(error).__name__}: {error}"
            break
        adding = ("matrices", "elements", "planned", "quantized", "left", "other scheme")
        row["recipes"][recipe] = {
            key: sum(one[key] for one in found) if key in adding else max(one[key] for one in found) for key in found[0]
        }
    return row | {"problem": problem or problem_of(row["recipes"]), "seconds": round(time.perf_counter() - start, 1)}


def quantized(model: nn.Module, inputs: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """Quantize one model and dequantize it again; what is said of it.

    Raises:
        FxquantError: it cannot be quantized.
        AssertionError: a module is not of its own class afterwards.
    """
    rules = fxquant.Recipe([fxquant.Rule("*", recipe)], misfit="shrink")
    experts, names = experts_of(model), tuple(experts_of(model))
    classes = {name: type(module) for name, module in model.named_modules()}
    sizes = {name: expert_weights(module) for name, module in experts.items()}
    full, _ = run(model, inputs, names)
    fxquant.quantize(model, rules, progress=False)
    record = record_of(model)
    assert record is not None
    left = {name: expert_weights(model.get_submodule(name)) for name in names}
    got, parts = run(model, inputs, names)
    fxquant.dequantize(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes, "other classes than before"
    want, own = run(model, inputs, names)
    entries = [e for e in record.plan.entries if e.kind in ("expert", "linear")]  # and no stack as a whole
    matrices = [e for e in entries if e.name.startswith(tuple(f"{name}." for name in names))]
    return {
        "matrices": len(matrices),
        "elements": elements(sizes),
        "planned": sum(math.prod(entry.shape) for entry in matrices),
        "quantized": sum(math.prod(entry.shape) for entry in matrices if entry.scheme is not None),
        "left": elements(left),
        "other scheme": sum(str(entry.scheme) != str(fxquant.Scheme.parse(recipe)) for entry in matrices),
        "kept": next((entry.reason for entry in matrices if entry.scheme is None), ""),
        "op error": max(distance(got, want), *(distance(parts[name], own[name]) for name in names)),
        "error": distance(want, full),
    }


def elements(weights: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
    """Of the weights of all modules."""
    return sum(math.prod(shape) for shapes in weights.values() for shape in shapes.values())


def problem_of(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    for recipe, one in recipes.items():
        wanted = one["elements"]
        if not wanted or one["planned"] != wanted:
            return f"{recipe}: {one['planned']} of {wanted} elements of expert weights in the plan"
        if one["left"] or one["quantized"] != wanted:
            return f"{recipe}: {one['left'] / wanted:.0%} of the expert weights are left in floats: {one['kept']}"
        if not one["op error"] <= BOUND:
            return f"{recipe}: {one['op error']:.1e} from the model with dequantized weights"
    return ""


def worker(folders: list[str], recipes: tuple[str, ...]) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for folder in folders:
        print(json.dumps(measure(folder, recipes)), flush=True)


def sweep(folders: list[str], chunk: int, recipes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(0, len(folders), chunk):
        part = folders[i : i + chunk]
        while part:
            command = [sys.executable, __file__, "--worker", json.dumps(part), "--recipes", *recipes]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if len(found) < len(part):
                crash = f"crashed: exit status {done.returncode}"
                found.append({"architecture": part[len(found)], "models": [], "recipes": {}, "problem": crash})
            rows += found
            part = part[len(found) :]
            print(f"{len(rows)} of {len(folders)}", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]], recipes: tuple[str, ...]) -> None:
    table = Table("architecture", "models", "matrices", "elements", *recipes, "problem", "seconds", title="Experts")
    for row in rows:
        found = row["recipes"]
        first = next(iter(found.values()), {})
        errors = [f"{found[r]['op error']:.0e} {found[r]['error']:.1%}" if r in found else "" for r in recipes]
        cells = [row["architecture"], " ".join(row["models"]), first.get("matrices", ""), first.get("elements", "")]
        table.add_row(*(escape(str(cell)) for cell in (*cells, *errors, row["problem"], row.get("seconds", ""))))
    Console(width=240).print(table)


def markdown(rows: list[dict[str, Any]], recipes: tuple[str, ...]) -> str:
    """The summary as the README shows it: a row per recipe, and the exceptions below."""
    lines = [f"| {' | '.join(HEAD)} |", f"|---|{'---:|' * (len(HEAD) - 1)}"]
    for recipe in recipes:
        found = [row["recipes"][recipe] for row in rows if recipe in row["recipes"]]
        done = [row["recipes"][recipe] for row in rows if not row["problem"]]
        wanted = max(sum(one["elements"] for one in found), 1)
        shares = [f"{sum(one[key] for one in found) / wanted:.1%}" for key in ("planned", "quantized")]
        errors = [one["error"] for one in done] or [math.nan]
        op_error = max((one["op error"] for one in done), default=math.nan)
        as_asked = sum(one["matrices"] - one["other scheme"] for one in done)
        cells = [f"`{recipe}`", f"{len(done)} of {len(rows)}", as_asked, *shares]
        cells += [f"{op_error:.1e}", f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    bad = [f"{row['architecture']} ({shorten(row['problem'])})" for row in rows if row["problem"]]
    return "\n".join([*lines, "", f"Exceptions: {'; '.join(bad) or 'none'}."])


HEAD = (
    "recipe",
    "architectures",
    "expert matrices",
    "weights in the plan",
    "quantized",
    "largest op error",
    "median error",
    "largest error",
)


def shorten(problem: str) -> str:
    return textwrap.shorten(problem, 240, placeholder=" ...")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", help="folders of transformers/models; default: all")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="what to quantize to")
    parser.add_argument("--chunk", type=int, default=12, help="architectures per interpreter")
    parser.add_argument("--markdown", action="store_true", help="print the summary as the README shows it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipes = tuple(arguments.recipes)
    if arguments.worker:
        worker(json.loads(arguments.worker), recipes)
        return
    rows = sweep(arguments.architectures or list(architectures()), arguments.chunk, recipes)
    show(rows, recipes)
    if arguments.markdown:
        print(markdown(rows, recipes))


if __name__ == "__main__":
    main()
