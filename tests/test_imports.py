"""Imports point down only: a module imports from the floors above its own line in this list, never beside or below."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxquant
import fxquant.passes

FLOORS: list[set[str]] = [
    {
        "errors",
        "tables",
        "unchanged",
        "capture_errors",
        "graph_layout",
        "inductor",
        "demo_data",
        "expert_forwards",
    },
    {"devices", "listing", "bits", "expert_layouts", "checkpoint_files"},
    {"scheme", "patterns", "borders", "name_match", "graph_boxes", "example_inputs", "perplexity", "pretrained"},
    {"native", "experts", "expert_containers", "cost", "activation_codecs"},
    {
        *("codecs", "lowering", "torchao_configs", "graph_picture", "graph_view", "tensor_files"),
        "speed_notes",
    },
    {"quantized_matmul", "op_arguments", "op_registration", "plane_stacks", "unfinished", "recoding"},
    {"expert_matmul"},
    {"ops", "plans", "rule", "histories", "checkpoints", "expert_stacks", "checkpoint_contents"},
    {
        "modules",
        "legality",
        "misfits",
        "reports",
        "presets",
        "progress",
        "expert_ops",
        "families",
        "gguf",
        "writers",
        "conversion_report",
    },
    {"rewrite", "linears", "recipe_yaml", "recipe_tables", "sequential_experts", "expert_modules"},
    {"model_tensors", "transformers_weights", "checkpoint_sources"},
    {
        "passes",
        "calibration",
        "recipe",
        "graph_capture",
        "dataflow",
        "install",
        "model_index",
        "plain_tensors",
        "stored_matrices",
    },
    {"compiler", "unused_rules", "model_report", "model_files", "expert_plans"},
    {"select", "own_source", "own_writer", "foreign_limits"},
    {"planning", "stored_models", "conversion_targets"},
    {"integrations", "full_weights", "inspection"},
    {"api", "loading"},
    {"demo"},
    {"conversion_choices", "checkpoint_tables"},
    {"conversion"},
    {"cli"},
]
ROOT = Path(fxquant.__file__).parent
PASSES = Path(fxquant.passes.__file__).parent
FILES = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "__init__"}
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def imports(path: Path) -> set[str]:
    """First name under fxquant of everything that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fxquant":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fxquant.")}
    return found


def files_of(name: str) -> list[Path]:
    folder = PASSES if name == "passes" else ROOT / name
    return [FILES[name]] if name in FILES else sorted(folder.glob("*.py"))


def test_every_module_has_one_floor() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"passes", "demo_data"}
    assert set(FLOOR) == set(FILES) | packages
    assert sum(len(floor) for floor in FLOORS) == len(FLOOR)


def test_every_package_is_installed() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(fxquant[\w.]*)",$', text.split("[tool.setuptools]")[1], flags=re.M))
    folders = {path.parent.relative_to(ROOT.parent) for path in ROOT.rglob("*.py") if "tests" not in path.parts}
    found = {".".join(folder.parts) for folder in folders} | {"fxquant.passes", "fxquant.demo_data"}
    assert {name for name in found if not name.startswith("fxquant.demo_data.")} == listed


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_go_down(name: str) -> None:
    for path in files_of(name):
        for imported in imports(path) - ({name} if name not in FILES else set()):
            assert FLOOR[imported] < FLOOR[name], f"{path.name} imports fxquant.{imported}"


def test_a_pass_imports_no_other_pass() -> None:
    for path in PASSES.glob("*.py"):
        if path.stem != "__init__":
            assert "passes" not in imports(path), path.name


def private_torch(path: Path) -> set[str]:
    """Private parts of torch that the file imports or reaches into: they move with every release."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        # torch.ops.aten._name is an op with a name of its own, not a private part of torch
        names = [n for n in names if n.startswith("torch.") and not n.startswith("torch.ops.")]
        found |= {n for n in names if any(re.match(r"_[a-z]", part) for part in n.split("."))}
    return found


def test_private_torch_is_in_one_file() -> None:
    paths = [
        *ROOT.glob("*.py"),
        *(ROOT / "codecs").glob("*.py"),
        *(ROOT / "lowering").glob("*.py"),
        *PASSES.glob("*.py"),
    ]
    assert {path.name for path in paths if private_torch(path)} == {"inductor.py"}


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_every_module_can_be_imported_first(name: str) -> None:
    importlib.import_module(f"fxquant.{name}")


def test_passes_has_one_name() -> None:
    root = Path(__file__).parents[1]  # from here `passes` is a folder that Python can import
    run = subprocess.run([sys.executable, "-c", "import passes"], cwd=root, capture_output=True, text=True, check=False)
    assert "ImportError: import fxquant.passes, not passes" in run.stderr
