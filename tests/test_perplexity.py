"""Perplexity against sums in float64, and the table that it makes for the README."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import FxquantError
from fxquant.perplexity import cut_windows, load_tokens, perplexity
from fxquant.pretrained import load_model, load_tokenizer

DATA = Path(__file__).parent / "data"


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self, logits: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.logits, self.dropout = nn.Parameter(logits), nn.Dropout(dropout)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.batches.append(tuple(ids.shape))
        return self.dropout(self.logits[ids])


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class WithOutput(Bigram):
    def forward(self, ids: Tensor) -> Any:
        return Output(super().forward(ids))


def oracle(logits: Tensor, tokens: Tensor, window: int, windows: int) -> float:
    """Token by token in float64."""
    table = logits.detach().double().numpy()
    losses = []
    for w in range(windows):
        part = tokens[w * window : (w + 1) * window].tolist()
        for a, b in itertools.pairwise(part):
            row = table[a]
            losses.append(np.logaddexp.reduce(row) - row[b])
    return math.exp(sum(losses) / len(losses))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    vocabulary=st.integers(2, 40),
    window=st.integers(2, 9),
    count=st.integers(1, 7),
    rest=st.integers(0, 8),
    batch=st.integers(1, 5),
)
def test_it_is_the_exponential_of_the_mean_cross_entropy(
    seed: int, vocabulary: int, window: int, count: int, rest: int, batch: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(vocabulary, vocabulary, generator=random)
    tokens = torch.randint(vocabulary, (count * window + rest % window,), generator=random)
    wanted = oracle(logits, tokens, window, count)
    assert perplexity(Bigram(logits), tokens, window, batch=batch) == pytest.approx(wanted, rel=1e-5)
    assert perplexity(WithOutput(logits), tokens, window, count, batch) == pytest.approx(wanted, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    assert perplexity(Bigram(torch.zeros(37, 37)), torch.arange(37).repeat(4), 8) == pytest.approx(37, rel=1e-6)


def test_windows_come_from_the_start_and_go_in_batches() -> None:
    logits, tokens = torch.randn(5, 5), torch.randint(5, (100,))
    model = Bigram(logits)
    found = perplexity(model, tokens, 8, windows=7, batch=3)
    assert model.batches == [(3, 8), (3, 8), (1, 8)]
    assert found == pytest.approx(oracle(logits, tokens, 8, 7), rel=1e-5)


def test_softmax_runs_in_float32_whatever_the_logits_are() -> None:
    logits, tokens = (4 * torch.randn(9, 9)).bfloat16(), torch.randint(9, (80,))
    assert perplexity(Bigram(logits), tokens, 8) == pytest.approx(oracle(logits.float(), tokens, 8, 10), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_training_flag_comes_back(training: bool) -> None:
    logits, tokens = torch.randn(9, 9), torch.randint(9, (80,))
    model = Bigram(logits, dropout=0.5).train(training)
    assert perplexity(model, tokens, 8) == pytest.approx(oracle(logits, tokens, 8, 10), rel=1e-5)
    assert model.training is training


def test_the_training_flag_comes_back_after_an_error() -> None:
    model = Bigram(torch.randn(3, 3)).train()
    with pytest.raises(IndexError):
        perplexity(model, torch.full((16,), 7), 8)
    assert model.training


def test_nan_is_not_hidden() -> None:
    logits = torch.randn(4, 4)
    logits[2, 1] = float("nan")
    assert math.isnan(perplexity(Bigram(logits), torch.tensor([0, 2, 1, 3]), 4))


@pytest.mark.parametrize(
    ("tokens", "window", "windows"),
    [
        (torch.arange(10), 8, 2),
        (torch.arange(7), 8, None),
        (torch.arange(10), 1, 2),
        (torch.arange(10), 0, None),
        (torch.arange(10), 4, 0),
        (torch.zeros(4, 8, dtype=torch.int64), 8, 1),
    ],
)
def test_a_text_that_is_too_short_is_an_error(tokens: Tensor, window: int, windows: int | None) -> None:
    with pytest.raises(FxquantError, match=r"windows of .* tokens are wanted, the text holds"):
        perplexity(Bigram(torch.zeros(10, 10)), tokens, window, windows)


def test_windows_do_not_overlap() -> None:
    assert torch.equal(cut_windows(torch.arange(11), 3), torch.arange(9).view(3, 3))
    assert torch.equal(cut_windows(torch.arange(11), 3, 2), torch.arange(6).view(2, 3))


def test_a_text_is_tokenized_once_without_special_tokens(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(DATA / "code-dense")
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    tokens = load_tokens(tokenizer, text)
    assert tokens.dtype == torch.int64
    assert len(tokens) > tokenizer.model_max_length  # longer than the context, and no warning about it
    assert not caplog.records
    assert tokenizer.decode(tokens) == text
    assert not set(tokens.tolist()) & set(tokenizer.all_special_ids)


def test_the_trained_model_has_the_loss_that_was_measured_when_it_was_trained() -> None:
    """2.50 nats per token on the first 100 windows: stated beside the model by who trained it."""
    tokens = load_tokens(load_tokenizer(DATA / "code-dense"), (DATA / "heldout.txt").read_text(encoding="utf-8"))
    model = load_model(DATA / "code-dense", progress=False).float()
    assert math.log(perplexity(model, tokens, 256, 100)) == pytest.approx(2.50, abs=0.005)


@pytest.fixture(scope="module")
def table() -> Any:
    path = Path(__file__).parent / "benchmarks" / "perplexity_table.py"
    spec = importlib.util.spec_from_file_location("perplexity_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["code-dense", "code-moe"])
def test_the_table_measures_what_it_prints(table: Any, name: str) -> None:
    rows = table.measure_all(name, ("int8", "nf4-dq"), 6)
    model, tokens = table.load(name)
    baseline = perplexity(model, tokens, 256, 6)
    assert rows[0].perplexity == baseline
    assert [row.scheme for row in rows] == ["bf16", "int8", "nf4-dq"]
    lines = table.markdown(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) == 5
    assert {len(line) for line in cells} == {5}
    for row, line in zip(rows[1:], cells[3:], strict=True):
        assert float(line[3]) == pytest.approx(row.perplexity, abs=6e-4)
        assert float(line[4].removesuffix(" %")) == pytest.approx(100 * (row.perplexity / baseline - 1), abs=6e-3)
    assert 8.0 < rows[1].bits < 8.2
    assert 4.1 < rows[2].bits < 4.2


def test_the_check_fails_where_a_scheme_costs_more_than_it_may(table: Any) -> None:
    def row(scheme: str, change: float) -> Any:
        return table.Row(scheme, "absmax", 8.0, 10.0, change, 1.0)

    assert (
        table.failures("code-dense", [row("int8", 0.09), row("nf4", -0.9), row("int4-g64", 1.5), row("fp8", 50.0)])
        == []
    )
    failed = table.failures("code-dense", [row("int8", 0.11), row("nf4", float("nan")), row("int4-g128", -1.6)])
    assert [line.split()[0] for line in failed] == ["int8", "nf4", "int4-g128"]
