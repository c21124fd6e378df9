"""The main job on a small trained model, measured as it runs: `fxquant demo`."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from fxquant.api import plan, quantize
from fxquant.errors import FileError
from fxquant.model_report import report
from fxquant.perplexity import cut_windows, load_tokens, perplexity
from fxquant.pretrained import load_model, load_tokenizer
from fxquant.reports import Report
from fxquant.tables import bytes_text

WINDOW = 256
PROMPT = "import json\n\n\ndef load_config(path):\n    with open(path) as"


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    report: Report
    perplexity_before: float
    perplexity_after: float
    text: str
    """What the quantized model wrote, the prompt in front."""
    same_tokens: bool | None
    """Whether the compiled model gave the tokens that it gives eagerly; None where it was not compiled."""


def demo_data() -> Path:
    """The folder of the trained model and the held-out text: with the installed package, or in this checkout.

    Raises:
        FileError: it is in neither place.
    """
    places = [Path("tests/data")]
    with contextlib.suppress(ModuleNotFoundError):
        places.insert(0, Path(str(importlib.resources.files("fxquant.demo_data") / "heldout.txt")).parent)
    for place in places:
        if (place / "heldout.txt").is_file() and (place / "code-dense").is_dir():
            return place
    raise FileError(
        "the demo's model and text are not installed, and tests/data is not here\n"
        "  run it in a checkout, or give --model and --text"
    )


def run_demo(
    console: Console,
    recipe: Any,
    *,
    model_path: str | None = None,
    text_path: str | None = None,
    windows: int = 64,
    tokens: int = 64,
    compiled: bool = True,
) -> DemoResult:
    """Load, plan, quantize, measure, generate; everything that is printed is measured here.

    Args:
        console: where to print.
        recipe: as for `fxquant.quantize`.
        model_path: directory or hub id of a causal language model; None for the one that comes along.
        text_path: file of held-out text; None for the one that comes along.
        windows: windows of 256 tokens that perplexity is measured on.
        tokens: tokens to generate.
        compiled: generate with the compiled model too.

    Raises:
        FxquantError: a file or a recipe is not as it should be.
    """
    source = model_path or str(demo_data() / "code-dense")
    text = Path(text_path) if text_path else demo_data() / "heldout.txt"
    model, tokenizer, ids = _load(console, source, text, windows)
    console.print()
    plan(model, recipe).table().show(console)
    with console.status("perplexity in full precision"):
        before = perplexity(model, ids, WINDOW, windows)
    started = time.perf_counter()
    quantize(model, recipe)
    seconds, made = time.perf_counter() - started, report(model)
    with console.status("perplexity, quantized"):
        after = perplexity(model, ids, WINDOW, windows)
    _print_sizes(console, made, before, after, seconds)
    same, written = _generate(console, model, tokenizer, tokens, compiled)
    return DemoResult(made, before, after, written, same)


def _load(console: Console, source: str, text: Path, windows: int) -> tuple[nn.Module, Any, Tensor]:
    """Model, tokenizer and the tokens of the text."""
    content = read_text(text)
    with console.status(f"loading {source}"):
        model, tokenizer = load_model(source, progress=False), load_tokenizer(source)
        ids = load_tokens(tokenizer, content)
    cut_windows(ids, WINDOW, windows)  # so that a text too short is refused before the work
    size = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    _fact(console, "model", f"{type(model).__name__}, {size / 1e6:.3g} M parameters, {dtype}, from {source}")
    _fact(console, "text", f"{len(ids):,} tokens of {text.name}, {windows} windows of {WINDOW} are used")
    return model, tokenizer, ids


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _print_sizes(console: Console, made: Report, before: float, after: float, seconds: float) -> None:
    small, large = bytes_text(made.bytes_after), bytes_text(made.bytes_before)
    whole = f"{bytes_text(made.model_bytes_before)} -> {bytes_text(made.model_bytes_after)}"
    bits = f"{made.bits_per_weight:.4g} bits per weight"
    _fact(console, "quantized", f"{made.counted} in {seconds:.1f} s, {bits}")
    _fact(console, "weights", f"{large} -> {small}, {made.ratio:.2f} times smaller (whole model: {whole})", strong=True)
    for worst in made.worst(1):
        _fact(console, "error", f"largest in {worst.name}: {worst.error:.2e}, SQNR {worst.sqnr_db:.1f} dB")
    change = 100 * (after / before - 1)
    _fact(console, "perplexity", f"{before:.3f} -> {after:.3f} ({change:+.2f} %)", strong=True)


def _generate(
    console: Console, model: nn.Module, tokenizer: Any, tokens: int, compiled: bool
) -> tuple[bool | None, str]:
    """Print what the quantized model writes, and whether it writes the same when compiled."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with console.status("generating, eager"):
        eager, seconds = _greedy(model, prompt, tokens)
    new, same, result = eager.shape[1] - prompt["input_ids"].shape[1], None, eager
    _fact(console, "eager", f"{new} tokens in {seconds:.1f} s")
    if compiled:
        backend = "inductor" if has_compiler() else "aot_eager"
        if backend != "inductor":
            _fact(console, "note", "no C++ compiler here: the graph is traced as usual, but runs eagerly (aot_eager)")
        with console.status("compiling: the first token takes its time"):
            result, seconds = _greedy(model, prompt, tokens, backend)
        same = torch.equal(eager, result)
        verdict = "the same tokens as eager" if same else "not the tokens that eager gives"
        _fact(console, "compiled", f"{new} tokens in {seconds:.1f} s with compilation, no graph break; {verdict}")
    written = str(tokenizer.decode(result[0], skip_special_tokens=True))
    console.print()
    console.print(Text.assemble((PROMPT, "dim"), (written.removeprefix(PROMPT), "green")))
    return same, written


def _greedy(model: Any, prompt: Any, tokens: int, backend: str | None = None) -> tuple[Tensor, float]:
    """The most likely continuation with a static cache, `[1, tokens]`, and the seconds that it took."""
    from transformers import CompileConfig

    options: dict[str, Any] = {"disable_compile": True}
    if backend is not None:
        no_mode: Any = None  # the default asks for CUDA graphs
        config: Any = CompileConfig(fullgraph=True, backend=backend, mode=no_mode)
        config._compile_all_devices = True  # without it transformers compiles on GPUs alone
        options = {"compile_config": config}
    options |= {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
    started = time.perf_counter()
    with torch.no_grad():
        result = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **options)
    return result, time.perf_counter() - started


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which `torch.compile` needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++", "cl"))


def _fact(console: Console, name: str, value: str, *, strong: bool = False) -> None:
    console.print(Text.assemble((f"{name:>10}  ", "cyan"), (value, "bold" if strong else "")), soft_wrap=True)
