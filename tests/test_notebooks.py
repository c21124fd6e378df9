"""The notebooks as files: without outputs, offline, and naming only what exists. CI executes them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["01_quantize", "02_look_at_the_graph", "03_write_a_pass"]


@pytest.fixture(params=NAMES)
def book(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{request.param}.ipynb", as_version=4)


def sources(book: Any, kind: str) -> list[str]:
    return [cell.source for cell in book.cells if cell.cell_type == kind]


def test_there_is_no_other() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


def test_they_are_committed_without_outputs(book: Any) -> None:
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_each_part_is_explained(book: Any) -> None:
    assert book.cells[0].source.startswith("# ")
    assert len(sources(book, "markdown")) >= len(sources(book, "code")) / 2


def test_what_they_import_exists(book: Any) -> None:
    names = 0
    for node in ast.walk(ast.parse("\n".join(sources(book, "code")))):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name.split(".")[0]) for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and _ours(node.module or ""):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                names += 1
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
    assert names >= 5


def _ours(module: str) -> bool:
    """What a test environment has; the notebooks' own extra brings matplotlib and IPython."""
    return module.split(".")[0] in ("fxquant", "torch", "transformers")


def test_they_find_the_model_wherever_they_run(book: Any) -> None:
    code = "\n".join(sources(book, "code"))
    assert "demo_data()" in code
    assert not re.search(r"[\"'](?:/|\.\./|~|https?:)", code)


def test_files_that_the_text_names_exist(book: Any) -> None:
    for path in re.findall(r"`(\w+/[\w/]+\.\w+)`", "\n".join(sources(book, "markdown"))):
        assert (ROOT / path).is_file(), path
