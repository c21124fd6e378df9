"""Peak memory of `quantize`, measured by the operating system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, pathlib, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
import fxquant

def llama(hidden, inner, layers):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=16000, dtype="bfloat16",
    )
    return filled(LlamaForCausalLM, config)

def mixtral(hidden, inner, layers):
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2000, num_local_experts=16, dtype="bfloat16",
    )
    return filled(MixtralForCausalLM, config)

def filled(cls, config):
    with torch.device("meta"):
        model = cls(config).bfloat16()
    model.to_empty(device="cpu")
    some = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(some)):
            part.copy_(some[: len(part)])
    for buffer in model.buffers():
        buffer.fill_(1)
    return model.eval()

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

kind, *recipes = sys.argv[1:]
make = {"dense": llama, "experts": mixtral}[kind]
for recipe in recipes:
    fxquant.quantize(make(256, 512, 1), recipe, progress=False)  # imports and caches, once
    model = make(2048, 8192, 2) if kind == "dense" else make(1024, 1024, 3)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    linears = [layer.weight.nbytes for layer in model.model.layers.modules() if type(layer) is torch.nn.Linear]
    planned = fxquant.plan(model, recipe).quantized
    first = [e.bytes_after for e in planned if ".layers.0.mlp.experts." in e.name]
    saved = sum(e.bytes_before - e.bytes_after for e in planned)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    fxquant.quantize(model, recipe, progress=False)
    peak, after = status("VmHWM") - before, status("VmRSS") - before
    found = {"size": size, "linear": max(linears), "experts": sum(first), "saved": saved, "peak": peak, "after": after}
    print(json.dumps(found))
    del model
"""


def measure(kind: str) -> list[dict[str, int]]:
    """Of `int4` and of `int8`."""
    # So the C library gives every freed tensor back at once, instead of when it sees fit.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, kind, "int4", "int8"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    both: list[dict[str, int]] = [json.loads(line) for line in run.stdout.splitlines()[-2:]]
    for measured in both:
        assert measured["size"] > 3e8
        # The memory of the old weights is given back to the system.
        assert measured["after"] <= -0.6 * measured["saved"]
    return both


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_the_model_and_its_largest_layer_twice() -> None:
    for measured in measure("dense"):
        assert measured["peak"] <= 2 * measured["linear"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_the_model_and_the_quantized_copy_of_one_layer_of_experts() -> None:
    graph = 24e6  # what it takes to capture the graph, weights apart
    for measured in measure("experts"):
        assert measured["peak"] <= measured["experts"] + graph
