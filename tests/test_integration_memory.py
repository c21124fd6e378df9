"""Peak memory of `from_pretrained` with an `FxQuantConfig`, in a process of its own: a model of 0.3 GB, and experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, pathlib, sys, threading
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from fxquant import FxQuantConfig

kind, recipe, folder = *sys.argv[1:3], pathlib.Path(sys.argv[3])

def config(small):
    sizes = dict(num_attention_heads=8, num_key_value_heads=4, dtype="bfloat16")
    if kind == "dense":
        hidden, inner, layers = (256, 512, 1) if small else (2048, 8192, 2)
        kind_of, sizes["vocab_size"] = LlamaConfig, 4000
    else:
        hidden, inner, layers = (256, 256, 1) if small else (1024, 1024, 2)
        kind_of, sizes["vocab_size"], sizes["num_local_experts"] = MixtralConfig, 2000, 16
    return kind_of(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, **sizes)

def write(path, config):
    # As checkpoints on the hub have them: experts one by one.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    from transformers.core_model_loading import revert_weight_conversion
    tensors = revert_weight_conversion(model, model.state_dict())
    block = torch.randn(1 << 20).mul_(0.02).bfloat16()
    def filled(shape):
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // len(block)))[:count].view(shape)
    path.mkdir()
    names = list(tensors)
    shards = [names[i : i + 16] for i in range(0, len(names), 16)]
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: filled(tensors[name].shape) for name in shard}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    sizes = [p.nbytes for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name]
    return sum(p.nbytes for p in model.parameters()), max(sizes)

def held():  # without the pages of the files themselves, which the system takes back as it likes
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=FxQuantConfig(recipe))

write(folder / "small", config(small=True))
load(folder / "small")  # imports and caches, once
size, largest = write(folder / "model", config(small=False))
done, before = threading.Event(), held()
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
model = load(folder / "model")
done.set()
thread.join()
final = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(json.dumps({"size": size, "largest": largest, "final": final, "peak": peak[0] - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "recipe", "size"), [("dense", "int8", 2.5e8), ("experts", "int4", 2e8)])
def test_peak_is_the_quantized_model_and_its_largest_weight_twice(
    kind: str, recipe: str, size: float, tmp_path: Path
) -> None:
    # So the C library gives every freed tensor back at once, instead of when it sees fit.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, kind, recipe, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["size"] > size
    assert found["final"] < 0.6 * found["size"]
    assert found["peak"] <= found["final"] + 2 * found["largest"], found
