"""A sample of the sweep over transformers' architectures (tests/benchmarks/sweep.py runs all of it)."""

from __future__ import annotations

import pytest
from sweep import LARGEST, measure

SAMPLE = [
    ("cohere2", "AutoModelForCausalLM"),
    ("gpt_bigcode", "AutoModelForCausalLM"),
    ("granitemoe", "AutoModelForCausalLM"),
    ("mamba", "AutoModelForCausalLM"),
    ("qwen3_next", "AutoModelForCausalLM"),
    ("olmo2", "AutoModelForCausalLM"),
    ("deberta-v2", "AutoModel"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("vit", "AutoModelForImageClassification"),
    ("wav2vec2", "AutoModelForCTC"),
    ("whisper", "AutoModelForSpeechSeq2Seq"),
    ("swin", "AutoModel"),
    ("gemma3", "AutoModelForImageTextToText"),
]


@pytest.mark.parametrize(("kind", "auto_class"), SAMPLE)
def test_captured_planned_whole_and_quantized(kind: str, auto_class: str) -> None:
    row = measure(kind, auto_class, compare=True, recipe="int8")
    assert row["result"].startswith("captured, "), row["result"]
    assert row["result"] == "captured, equal" or float(row["result"].split()[-1]) < 1e-5
    assert row["accounted"] == "100%"
    assert row["quantized"] > 0
    assert row["error"] <= LARGEST
    assert row["op error"] <= 1e-5
