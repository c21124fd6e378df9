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
    for parameter in model.parameters():
        parameter.data.view(-1)[:] = 1
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), 1 << 20):
            flat[start : start + (1 << 20)].normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.fill_(1)
    return model.eval()

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

kind, recipe = sys.argv[1:]
make = {"dense": llama, "experts": mixtral}[kind]
fxquant.quantize(make(256, 512, 1), recipe, progress=False)  # imports and caches, once
model = make(2048, 8192, 7) if kind == "dense" else make(1024, 1024, 11)
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
"""


def measure(kind: str, recipe: str) -> dict[str, int]:
    # So the C library gives every freed tensor back at once, instead of when it sees fit.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, kind, recipe]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    measured: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 1e9
    # The memory of the old weights is given back to the system.
    assert measured["after"] <= -0.6 * measured["saved"]
    return measured


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_peak_is_the_model_and_its_largest_layer_twice(recipe: str) -> None:
    measured = measure("dense", recipe)
    assert measured["peak"] <= 2 * measured["linear"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_peak_is_the_model_and_the_quantized_copy_of_one_layer_of_experts(recipe: str) -> None:
    measured = measure("experts", recipe)
    graph = 24e6  # what it takes to capture the graph, weights apart
    assert measured["peak"] <= measured["experts"] + graph
