"""The demo: what it prints is what it measured."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxquant
from fxquant.demo import PROMPT, DemoResult, demo_data, has_compiler, read_text, run_demo
from fxquant.errors import FileError, FxquantError
from fxquant.perplexity import load_tokens, perplexity
from fxquant.pretrained import load_model, load_tokenizer

DATA = Path(__file__).parent / "data"


def demo(recipe: str, **options: object) -> tuple[str, DemoResult]:
    output = io.StringIO()
    result = run_demo(Console(file=output, width=80), recipe, **options)  # type: ignore[arg-type]
    return output.getvalue(), result


def fact(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(f"{name}  ")).strip()[len(name) :].strip()


@pytest.fixture(scope="module")
def int4() -> tuple[str, DemoResult]:
    return demo("int4", windows=3, tokens=6)


def test_it_prints_the_plan_and_the_sizes(int4: tuple[str, DemoResult]) -> None:
    text, result = int4
    plan = fxquant.plan(load_model(DATA / "code-dense", progress=False), "int4")
    assert str(plan) in text
    before = sum(e.bytes_before for e in plan.quantized)
    after = sum(e.bytes_after for e in plan.quantized)
    assert (result.report.bytes_before, result.report.bytes_after) == (before, after)
    assert before / after >= 3.5
    assert fact(text, "weights").startswith(f"6.29 MB -> 1.62 MB, {before / after:.2f} times smaller")
    assert "LlamaForCausalLM, 4.2 M parameters, bfloat16" in fact(text, "model")
    assert fact(text, "text") == "126,494 tokens of heldout.txt, 3 windows of 256 are used"


def test_perplexity_is_measured_before_and_after_on_the_same_windows(int4: tuple[str, DemoResult]) -> None:
    text, result = int4
    model = load_model(DATA / "code-dense", progress=False)
    tokens = load_tokens(load_tokenizer(DATA / "code-dense"), (DATA / "heldout.txt").read_text(encoding="utf-8"))
    before = perplexity(model, tokens, 256, 3)
    after = perplexity(fxquant.quantize(model, "int4", progress=False), tokens, 256, 3)
    assert result.perplexity_before == pytest.approx(before, rel=1e-6)
    assert result.perplexity_after == pytest.approx(after, rel=1e-6)
    assert fact(text, "perplexity") == f"{before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.2f} %)"


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_the_compiled_model_writes_what_the_eager_one_writes(int4: tuple[str, DemoResult]) -> None:
    text, result = int4
    assert result.same_tokens is True
    assert re.fullmatch(
        r"6 tokens in [\d.]+ s with compilation, no graph break; the same tokens as eager", fact(text, "compiled")
    )
    model = fxquant.quantize(load_model(DATA / "code-dense", progress=False), "int4", progress=False)
    tokenizer = load_tokenizer(DATA / "code-dense")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    wanted = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=6)
    assert result.text == tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert result.text.startswith(PROMPT)
    assert result.text in text


def test_other_recipes_models_and_texts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("def f(x):\n    return x\n" * 200)
    text, result = demo(
        "int8",
        model_path=str(DATA / "code-dense"),
        text_path=str(tmp_path / "own.txt"),
        windows=2,
        tokens=2,
        compiled=False,
    )
    assert {layer.scheme for layer in result.report.layers} == {"int8"}
    assert result.same_tokens is None
    assert "compiled" not in text
    assert "of own.txt, 2 windows" in text
    assert result.perplexity_after == pytest.approx(result.perplexity_before, rel=0.02)


def test_without_a_compiler_the_graph_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.demo.has_compiler", lambda: False)
    torch.compiler.reset()
    text, result = demo("int8", windows=1, tokens=4)
    assert "no C++ compiler here" in fact(text, "note")
    assert "no graph break" in fact(text, "compiled")
    assert result.same_tokens is True


def test_a_compiler_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not has_compiler()
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert has_compiler()


def test_the_data_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = demo_data()
    assert (found / "code-dense" / "model.safetensors").is_file()
    assert read_text(found / "heldout.txt").startswith((DATA / "heldout.txt").read_text(encoding="utf-8")[:100])


def test_without_the_data_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fxquant.demo_data", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="give --model and --text"):
        demo_data()
    monkeypatch.chdir(DATA.parents[1])
    assert demo_data() == Path("tests/data")


def test_a_text_that_is_too_short_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x = 1\n")
    with pytest.raises(FxquantError, match="3 windows of 256 tokens are wanted, the text holds 0"):
        demo("int4", text_path=str(tmp_path / "short.txt"), windows=3)
