"""A sample of the sweep over architectures with experts (tests/benchmarks/experts_sweep.py runs all of it)."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from expert_architectures import architectures, expert_weights
from expert_classes import experts_classes, experts_module
from experts_sweep import BOUND, markdown, measure, problem_of, quantized
from torch import nn

SAMPLE = [  # a class of every layout and forward there is, and experts that are modules
    *("dbrx", "ernie4_5_vl_moe", "gemma4", "gpt_oss", "inkling", "jetmoe", "llama4", "longcat_flash"),
    *("mixtral", "nemotron_h", "openai_privacy_filter", "step3p7", "switch_transformers", "vitpose_backbone"),
]


@pytest.mark.parametrize("folder", SAMPLE)
def test_all_experts_are_quantized_and_compute_what_their_weights_say(folder: str) -> None:
    row = measure(folder, ("int8", "mxfp4"))
    assert row["problem"] == ""
    for recipe in ("int8", "mxfp4"):
        found = row["recipes"][recipe]
        assert found["quantized"] == found["planned"] == found["elements"] > 0
        assert found["other scheme"] == 0
        assert found["op error"] <= BOUND
        assert found["error"] > 0
    assert row["recipes"]["int8"]["error"] < min(0.03, row["recipes"]["mxfp4"]["error"])


def test_architectures_are_found() -> None:
    """Those with stacked experts and those with modules; and no fewer than there were when this was written."""
    found = architectures()
    assert found["nllb_moe"] == ("NllbMoeExperts",)
    assert found["inkling"] == ("InklingExperts", "InklingSharedExperts")
    assert set(SAMPLE) <= set(found)
    assert len(found) >= 72
    assert set(experts_classes()) <= {name for names in found.values() for name in names}


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("MixtralExperts", 4 * 3 * 64 * 128),
        ("GptOssExperts", 4 * 3 * 64 * 128),  # without its biases
        ("DbrxExperts", 4 * 3 * 64 * 128),
        ("NemotronHExperts", 4 * 2 * 64 * 128),
        ("JetMoeParallelExperts", 4 * 64 * 128),
        ("MuseSparkExperts", 4 * 3 * 64 * 128),  # without its norm
        ("LongcatFlashExperts", 4 * 3 * 64 * 128),  # without the rows of experts that do nothing
    ],
)
def test_weights_are_counted_from_the_parameters(name: str, elements: int) -> None:
    assert sum(math.prod(shape) for shape in expert_weights(experts_module(name)).values()) == elements


def test_what_is_left_in_floats_is_found() -> None:
    """A class that fxquant cannot read: its weights stay, which the sweep must not let pass."""

    class MixtralExperts(nn.Module):  # named like a class of experts, and nothing like one
        def __init__(self) -> None:
            super().__init__()
            self.wi = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.wi[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.head = MixtralExperts(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.experts(x))

    found = quantized(Model(), {"x": torch.randn(3, 8)}, "int8")
    assert (found["elements"], found["planned"], found["left"]) == (128, 0, 128)
    assert problem_of({"int8": found}) == "int8: 0 of 128 elements of expert weights in the plan"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"planned": 3}, "nf4: 3 of 4 elements of expert weights in the plan"),
        ({"elements": 0, "planned": 0}, "nf4: 0 of 0 elements of expert weights in the plan"),
        ({"quantized": 3, "left": 1, "kept": "shared"}, "nf4: 25% of the expert weights are left in floats: shared"),
        ({"left": 2}, "nf4: 50% of the expert weights are left in floats: "),
        ({"op error": 2 * BOUND}, "nf4: 2.0e-05 from the model with dequantized weights"),
        ({"op error": math.nan}, "nf4: nan from the model with dequantized weights"),
    ],
)
def test_problems_are_named(change: dict[str, float], problem: str) -> None:
    found = {"matrices": 1, "elements": 4, "planned": 4, "quantized": 4, "left": 0, "kept": ""}
    found |= {"other scheme": 0, "op error": 0.0, "error": 0.1} | change
    assert problem_of({"nf4": found}) == problem
    row = {"architecture": "x", "models": [], "recipes": {"nf4": found}, "problem": problem}
    assert markdown([row], ("nf4",)).endswith(f"Exceptions: {f'x ({problem.strip()})' if problem else 'none'}.")
