"""The README is true: its code runs, its files and commands exist, its tables are those of the benchmarks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer.main
from torch import nn

import fxquant
from fxquant.cli import app
from fxquant.rewrite import rewrite

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def between(name: str) -> str:
    return README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


@pytest.fixture(scope="module")
def ran() -> Iterator[tuple[ModuleType, str]]:
    """The module that the README's Python makes, block after block, and what it printed."""
    module, printed = ModuleType("readme"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        patch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), vars(module))
        yield module, printed.getvalue()


def test_python_blocks_make_what_they_say(ran: tuple[ModuleType, str]) -> None:
    module, _ = ran
    assert len(blocks("python")) >= 3
    assert len(blocks("python")[0].splitlines()) <= 12
    tokens = torch.tensor([[5, 17, 42]])
    with torch.no_grad():
        expected = module.model(tokens, use_cache=False).logits.float()
        got = module.compiled(tokens, use_cache=False).logits.float()
    assert (got - expected).norm() / expected.norm() < 0.02


def test_printed_tables_are_what_is_printed(ran: tuple[ModuleType, str]) -> None:
    printed = {_line(line) for line in ran[1].splitlines()}
    for title in ("plan", "report"):
        found = [block for block in blocks("text") if block.startswith(title)]
        assert found
        lines = {_line(line) for block in found for line in block.splitlines()}
        shown = {line for line in lines if line and not line.startswith(("...", "─"))}  # a rule is as wide as its table
        assert len(shown) > 5
        assert shown <= printed


def _line(line: str) -> str:
    """Without widths, and errors to two digits: with a C++ compiler and without, the third may differ."""
    return " ".join(re.sub(r"(\d\.\d)\d(e-\d\d)", r"\1\2", line).split())


def test_before_and_after_are_from_the_history(ran: tuple[ModuleType, str]) -> None:
    (block,) = (block for block in blocks("text") if block.startswith("- q_proj"))
    text = ran[0].history(ran[0].model).text("model.layers.0.self_attn")
    shown, there = ({_unnumbered(line) for line in part.splitlines()} for part in (block, text))
    assert len(shown) >= 5
    assert shown <= there


def _unnumbered(line: str) -> str:
    """A line without the numbers at the ends of names: torch counts nodes, and other versions make others."""
    return re.sub(r"_\d+\b", "", line.strip())


def test_the_pass_is_short_and_fires_in_every_block(ran: tuple[ModuleType, str]) -> None:
    (source,) = (block for block in blocks("python") if "(Pass)" in block)
    assert len(source[source.index("@dataclass") : source.index("compiled =")].strip().splitlines()) <= 30
    graph = fxquant.capture(ran[0].original)
    history = rewrite(graph, passes=(ran[0].GateInFloat32(),))
    assert len(history.steps[0].fired) == ran[0].original.config.num_hidden_layers


def test_experts_of_a_class_of_ones_own_are_quantized_and_compute_the_same(ran: tuple[ModuleType, str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.experts = ran[0].ReluExperts(3, 32, 64)
    args = torch.randn(7, 32), torch.tensor([0, 2, 2, 1, 0, 0, 1]), torch.rand(7)
    want = model.experts(*args)
    fxquant.quantize(model, "int8", progress=False)
    assert [layer.name for layer in fxquant.report(model).layers][:2] == ["experts.0.up_proj", "experts.0.down_proj"]
    got = model.experts(*args)
    assert 0 < (got - want).norm() < 0.02 * want.norm()
    fxquant.dequantize(model)
    torch.testing.assert_close(model.experts(*args), got)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 3
    for link in links:
        assert (ROOT / link).exists(), link


def test_named_files_exist() -> None:
    for path in re.findall(r"`?python (tests/\S+\.py)", README):
        assert (ROOT / path).exists(), path


def test_named_commands_and_options_exist() -> None:
    commands = typer.main.get_command(app).commands
    named = re.findall(r"`fxquant (?!--)(\w+)([^`]*)`|&& fxquant (\w+)()$", README, flags=re.M)
    assert {"demo", "plan", "quantize", "inspect"} <= {first or last for first, _, last, _ in named} <= set(commands)
    for first, rest, last, _ in named:
        known = {option for parameter in commands[first or last].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?\w+", rest)) <= known


def test_named_options_of_scripts_exist() -> None:
    named = re.findall(r"python (tests/\S+\.py)((?: --\w+)*)", README)
    assert len(named) >= 2
    for path, options in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for option in options.split():
            assert f'"{option}"' in source, (path, option)


def test_named_extras_exist() -> None:
    metadata = importlib.metadata.metadata("fxquant")
    named = {extra for group in re.findall(r'"\.\[([\w,]+)\]"', README) for extra in group.split(",")}
    assert named == set(metadata.get_all("Provides-Extra") or ())


def test_the_test_command_stands_alone_on_its_line() -> None:
    assert re.search(r"^pytest -q -n 2$", README, flags=re.M)


@pytest.mark.parametrize(("model", "marker"), [("code-dense", "perplexity"), ("code-moe", "perplexity-moe")])
def test_perplexity_table_has_the_rows_of_the_benchmark_within_its_limits(model: str, marker: str) -> None:
    from perplexity_table import LIMITS, SCHEMES

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in between(marker).splitlines() if "|" in line]
    table = {row[0]: row for row in rows[2:]}
    assert list(table) == ["bf16", *SCHEMES[model]]
    for scheme, limit in LIMITS[model].items():
        change = float(table[scheme][4].split()[0])
        assert change <= limit
        assert change == pytest.approx(100 * (float(table[scheme][3]) / float(table["bf16"][3]) - 1), abs=0.02)


def test_sweep_table_answers_the_questions_of_the_benchmark() -> None:
    from sweep import summary

    row = {"model": "x", "result": "captured", "error": 0.0, "op error": 0.0, "accounted": "100%"}
    questions = [question for question, _ in summary([row])]
    assert re.findall(r"^\| ([^|]+) \|", between("sweep"), flags=re.M)[1:] == questions


def test_experts_table_is_that_of_the_benchmark_with_few_exceptions() -> None:
    from experts_sweep import RECIPES

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in between("experts-sweep").splitlines()]
    table = [row for row in rows if row and row[0].startswith("`")]
    assert [row[0].strip("`") for row in table] == list(RECIPES)
    for row in table:
        passed, tried = map(int, row[1].split(" of "))
        assert tried - passed <= 3
        assert row[3] == "100.0%"
        assert float(row[5]) <= 1e-5


def test_loaded_checkpoints_are_in_their_table() -> None:
    from load_table import COLUMNS, FOLDER, measure

    lines = (ROOT / "tests/benchmarks/load_table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) > 30
    known = {tuple(row[:4]) for row in rows}
    assert {measure(path.parent)[:4] for path in FOLDER.glob("*/meta.json")} <= known


def test_error_example_is_what_is_said() -> None:
    from fxquant import FxquantError, plan
    from fxquant.pretrained import load_model

    with pytest.raises(FxquantError) as caught:
        plan(load_model(str(ROOT / "tests/data/code-dense"), progress=False), [("*.mpl.*", "int4")])
    assert f"RecipeError: {caught.value}\n" in README


def test_no_line_names_a_place_on_a_machine() -> None:
    assert not re.findall(r"(?:^|[^a-z.])/(?:work|root|home)/", README)
