"""`quantize`, then plain `torch.compile`, then `generate`: the same tokens as eager, two graphs, no graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, fx, nn

from fxquant.api import dequantize, quantize
from fxquant.listing import op_name
from fxquant.modules import QLinear
from fxquant.passes import COMPILE
from fxquant.rewrite import rewrite

STATIC = {
    **dict.fromkeys(("llama", "gemma3_text", "gpt2"), "inductor"),
    **dict.fromkeys(("qwen3", "mistral", "phi3", "opt", "gpt_neox"), "aot_eager"),
}
"""What compiles them: Inductor where blocks differ much, else what captures graphs as Inductor does."""
DYNAMIC = {"falcon": "inductor", "bloom": "aot_eager"}
"""transformers gives these classes no static cache (`_can_compile_fullgraph` is False)."""
SIBLINGS = {"llama": [3, 2], "qwen3": [3, 2], "mistral": [3, 2], "gemma3_text": [3, 2], "opt": [3]}
"""Weights per merged call in one block; the other architectures store q/k/v as one weight already."""


def quantized(kind: str) -> nn.Module:
    return quantize(tiny_model(kind), "int8", progress=False)


def generate(model: Any, cache: str | None) -> Tensor:
    tokens = torch.tensor([[5, 17, 42, 99, 7, 3]])
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    return model.generate(
        tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, disable_compile=True, pad_token_id=0, **options
    )


@pytest.mark.parametrize(
    ("kind", "cache", "backend"),
    [*((k, "static", how) for k, how in STATIC.items()), *((k, None, how) for k, how in DYNAMIC.items())],
)
def test_compiled_generate_equals_eager(kind: str, cache: str | None, backend: str) -> None:
    model = quantized(kind)
    with torch.no_grad():
        expected = generate(model, cache)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        got = generate(model, cache)
    assert torch.equal(got, expected)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    # A dynamic cache grows, so its decode graph is compiled once more, with a symbolic length.
    assert graphs == 2 if cache else graphs in (2, 3)


@pytest.mark.parametrize("kind", list(SIBLINGS))
def test_backend_merges_siblings_in_every_block(kind: str) -> None:
    model = quantized(kind)
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        rewrite(gm, passes=COMPILE)
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        expected = generate(model, "static")
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
        got = generate(model, "static")
    assert torch.equal(got, expected)
    assert len(graphs) == 2
    layers = model.config.num_hidden_layers
    for gm in graphs:
        merged = [len(n.args[4]) for n in gm.graph.nodes if op_name(n) == "fxquant.linear" and len(n.args[4]) > 1]
        assert merged == SIBLINGS[kind] * layers


def test_backend_is_found_by_name_and_takes_passes_and_modes() -> None:
    x = torch.randn(3, 64)
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    model = quantize(layers, "int8", example_inputs=(x,), progress=False)
    assert "fxquant" in torch._dynamo.list_backends(exclude_tags=())
    with torch.no_grad():
        expected = model(x)
        for options in ({}, {"passes": ()}, {"epilogue_fusion": False}):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="fxquant", fullgraph=True, options=options)
            torch.testing.assert_close(compiled(x), expected, atol=2e-5, rtol=1e-4)


def test_transformers_own_compilation_of_generate() -> None:
    from transformers import CompileConfig

    model = quantized("qwen3")
    with torch.no_grad():
        expected = generate(model, "static")
        torch._dynamo.reset()
        config = CompileConfig(mode=None, fullgraph=True)
        config._compile_all_devices = True
        got = model.generate(
            torch.tensor([[5, 17, 42, 99, 7, 3]]),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            compile_config=config,
        )
    assert torch.equal(got, expected)


def test_dequantized_model_generates_the_same() -> None:
    model = quantized("gpt2")
    with torch.no_grad():
        expected = generate(model, None)
        kinds = {type(m).__name__ for m in model.modules()}
        dequantize(model)
        assert "Conv1D" in {type(m).__name__ for m in model.modules()} - kinds
        assert not any(isinstance(m, QLinear) for m in model.modules())
        assert torch.equal(generate(model, None), expected)
