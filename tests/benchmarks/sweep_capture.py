"""Capture a tiny random model of every causal LM configuration of transformers, and of some 50 other classes.

    python tests/benchmarks/sweep_capture.py [types ...] [--equal] [--chunk 20]

Types run in chunks, each in an interpreter of its own, so that one crash does not end the sweep. With `--equal` the
graph's outputs are compared with the model's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils import _pytree as pytree

from fxquant import dataflow
from fxquant.capture import capture
from fxquant.errors import CaptureError
from fxquant.linears import find_linears, find_stacked

LONGEST = 240  # characters of a reason
COLUMNS = ("model", "result", "linears", "called", "stacked", "routers", "read elsewhere", "bare", "seconds")


def _tiny_models() -> Any:
    path = Path(__file__).parents[1] / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(kind: str, auto_class: str, compare: bool) -> dict[str, Any]:
    """One row: what became of one configuration."""
    row: dict[str, Any] = {"model": kind if auto_class == "AutoModelForCausalLM" else f"{kind} ({auto_class})"}
    try:
        model = _tiny_models().tiny_model(kind, auto_class)
    except Exception as error:
        return row | {"result": f"not built: {type(error).__name__}: {error}"}
    sites = find_linears(model)
    row |= {"linears": len(sites), "stacked": len(find_stacked(model)), "result": "captured"}
    start = time.perf_counter()
    try:
        gm = capture(model)
    except CaptureError as error:
        return row | {"result": f"not captured: {error}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["called"] = len(sites) - len(dataflow.uncalled(gm, sites))
    row["routers"] = len(dataflow.routers(gm, sites))
    row["read elsewhere"] = len(dataflow.read_elsewhere(gm, sites))
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


def worker(models: list[tuple[str, str]], compare: bool) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for kind, auto_class in models:
        print(json.dumps(measure(kind, auto_class, compare)), flush=True)


def sweep(models: list[tuple[str, str]], chunk: int, compare: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(0, len(models), chunk):
        part = models[i : i + chunk]
        while part:
            command = [sys.executable, __file__, "--worker", json.dumps(part), *(["--equal"] if compare else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if len(found) < len(part):
                found.append({"model": part[len(found)][0], "result": f"crashed: exit status {done.returncode}"})
            rows += found
            part = part[len(found) :]
            print(f"{len(rows)} of {len(models)}", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS, title="Capture of tiny random models")
    for row in rows:
        table.add_row(*(escape(" ".join(str(row.get(column, "")).split())[:LONGEST]) for column in COLUMNS))
    built = [row for row in rows if not str(row["result"]).startswith("not built")]
    dense = [row for row in built if not row.get("stacked")]
    console = Console(width=200)
    console.print(table)
    for name, part in (("configurations", rows), ("dense, built", dense), ("with stacked weights, built", built)):
        part = [row for row in part if row.get("stacked")] if name.startswith("with") else part
        captured = sum(str(row["result"]).startswith("captured") for row in part)
        console.print(f"{name}: {len(part)}, captured {captured} ({captured / max(len(part), 1):.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, or type:AutoClass; default: all")
    parser.add_argument("--equal", action="store_true", help="compare the graph's outputs with the model's")
    parser.add_argument("--chunk", type=int, default=20, help="models per interpreter")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker), arguments.equal)
        return
    tiny = _tiny_models()
    known = [*((kind, "AutoModelForCausalLM") for kind in tiny.causal_lm_types()), *tiny.OTHER_MODELS]
    named = [(t.partition(":")[0], t.partition(":")[2] or "AutoModelForCausalLM") for t in arguments.types]
    show(sweep(named or known, arguments.chunk, arguments.equal))


if __name__ == "__main__":
    main()
