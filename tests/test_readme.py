"""The README is true: its code runs, its files and commands exist, its tables are those of the benchmarks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def between(name: str) -> str:
    return README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def test_python_blocks_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    module = type(sys)("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
    found = blocks("python")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "README.md", "exec"), vars(module))
    printed = capsys.readouterr().out
    for line in re.findall(r"^ (model\.layers\S+ .*|lm_head .*|\d+ of \d+ weights .*)$", blocks("text")[0], flags=re.M):
        assert re.sub(r"\s+", " ", line).strip() in re.sub(r"\s+", " ", printed)
    tokens = module.torch.tensor([[5, 17, 42]])
    with module.torch.no_grad():
        expected = module.model(tokens, use_cache=False).logits.float()
        got = module.compiled(tokens, use_cache=False).logits.float()
    assert (got - expected).norm() / expected.norm() < 0.02


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 3
    for link in links:
        assert (ROOT / link).exists(), link


def test_named_files_exist() -> None:
    for path in re.findall(r"`?python (tests/\S+\.py)", README):
        assert (ROOT / path).exists(), path


def test_the_test_command_stands_alone_on_its_line() -> None:
    assert re.search(r"^pytest -q -n 2$", README, flags=re.M)


def test_perplexity_table_has_the_rows_of_the_benchmark_within_its_limits() -> None:
    from perplexity_table import LIMITS, SCHEMES

    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in between("perplexity").splitlines() if "|" in line
    ]
    table = {row[0]: row for row in rows[2:]}
    assert list(table) == ["bf16", *SCHEMES]
    for scheme, limit in LIMITS.items():
        change = float(table[scheme][4].split()[0])
        assert change <= limit
        assert change == pytest.approx(100 * (float(table[scheme][3]) / float(table["bf16"][3]) - 1), abs=0.02)


def test_sweep_table_answers_the_questions_of_the_benchmark() -> None:
    from sweep import summary

    row = {"model": "x", "result": "captured", "error": 0.0, "op error": 0.0, "accounted": "100%"}
    questions = [question for question, _ in summary([row])]
    assert re.findall(r"^\| ([^|]+) \|", between("sweep"), flags=re.M)[1:] == questions


def test_error_example_is_what_is_said() -> None:
    from fxquant import FxquantError, plan
    from fxquant.pretrained import load_model

    with pytest.raises(FxquantError) as caught:
        plan(load_model(str(ROOT / "tests/data/code-dense"), progress=False), [("*.mpl.*", "int4")])
    assert f"RecipeError: {caught.value}\n" in README


def test_no_line_names_a_place_on_a_machine() -> None:
    assert not re.findall(r"(?:^|[^a-z.])/(?:work|root|home)/", README)
