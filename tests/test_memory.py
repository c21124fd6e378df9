"""Peak memory of `quantize`, measured by the operating system in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, pathlib, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import fxquant

def llama(hidden, inner, layers):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=16000, dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
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

recipe = sys.argv[1]
fxquant.quantize(llama(256, 512, 1), recipe, progress=False)  # imports and caches, once
model = llama(2048, 8192, 7)
size = sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(layer.weight.nbytes for layer in model.model.layers.modules() if type(layer) is torch.nn.Linear)
planned = fxquant.plan(model, recipe).quantized
saved = sum(e.bytes_before - e.bytes_after for e in planned)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
before = status("VmRSS")
fxquant.quantize(model, recipe, progress=False)
peak, after = status("VmHWM") - before, status("VmRSS") - before
print(json.dumps({"size": size, "largest": largest, "saved": saved, "peak": peak, "after": after}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_peak_is_the_model_and_its_largest_layer_twice(recipe: str) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, recipe], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 1e9
    assert measured["peak"] <= 2 * measured["largest"]
    # and the memory of the old weights is given back to the system
    assert measured["after"] <= -0.6 * measured["saved"]
