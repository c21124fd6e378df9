"""The pass of the third notebook, taken from its source: a user's pass, in at most 30 lines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor, nn

from fxquant import capture, quantize
from fxquant.passes import COMPILE, DEFAULT
from fxquant.rewrite import rewrite

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def source() -> dict[str, str]:
    """The cells of the notebook that carry a tag, by tag."""
    book = nbformat.read(NOTEBOOKS / "03_write_a_pass.ipynb", as_version=4)
    return {cell.metadata["tags"][0]: cell.source for cell in book.cells if cell.metadata.get("tags")}


@pytest.fixture(scope="module")
def written(source: dict[str, str]) -> ModuleType:
    module = ModuleType("written")
    sys.modules["written"] = module
    exec(f"import torch\n{source['helper']}\n{source['pass']}", vars(module))
    return module


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def rounded(x: Tensor, bits: int) -> Tensor:
    """Symmetric rounding per token, in float64."""
    high = 2 ** (bits - 1) - 1
    scale = x.double().abs().amax(-1, keepdim=True) / high
    return (torch.round(x.double() / scale) * scale).float()


def expected(model: Any, x: Tensor, bits: int, spare: str = "") -> Tensor:
    hidden = torch.relu(model.first(x if spare == "first" else rounded(x, bits)))
    return model.second(hidden if spare == "second" else rounded(hidden, bits))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return quantize(Two(), "int8", example_inputs=(torch.randn(3, 64),), progress=False)


def test_it_is_short(source: dict[str, str]) -> None:
    assert len(source["pass"].splitlines()) <= 30


@pytest.mark.parametrize("bits", [8, 4])
def test_it_rounds_the_input_of_every_quantized_linear(written: ModuleType, model: nn.Module, bits: int) -> None:
    x = torch.randn(3, 64)
    graph = capture(model, (x,))
    history = rewrite(graph, None, (*DEFAULT, written.RoundInputs(bits)))
    assert len(history.steps[-1].fired) == 2
    torch.testing.assert_close(graph(x), expected(model, x, bits))


def test_it_stays_out_where_it_is_told_to(written: ModuleType, model: nn.Module) -> None:
    x = torch.randn(3, 64)
    graph = capture(model, (x,))
    history = rewrite(graph, None, (*DEFAULT, written.RoundInputs(4, spare="second")))
    assert [miss.reason for miss in history.steps[-1].missed] == ["second is spared"]
    torch.testing.assert_close(graph(x), expected(model, x, 4, spare="second"))


def test_it_runs_at_compile_time(written: ModuleType, model: nn.Module) -> None:
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    options = {"passes": (*COMPILE, written.RoundInputs(4))}
    compiled = torch.compile(model, backend="fxquant", fullgraph=True, options=options)
    torch.testing.assert_close(compiled(x), expected(model, x, 4))
