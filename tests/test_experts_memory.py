"""What experts touch, counted by the operating system: pages that a token's products read, memory that planes take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAYER = """
import json, math, mmap, pathlib, sys
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from fxquant import codecs, native
from fxquant.expert_modules import QExperts
from fxquant.experts import expert_weight, layout_of
from fxquant.scheme import Scheme

torch.set_grad_enabled(False)

def layer(experts, hidden, inner):
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).bfloat16().requires_grad_(False)
    some = torch.randn(hidden * inner).mul_(0.02)
    for parameter in module.parameters():
        for part in parameter.data.view(-1).split(len(some)):
            part.copy_(some[: len(part)])
    return module

def quantized(module, spelling):
    layout, scheme = layout_of(module), Scheme.parse(spelling)
    matrices = [(e, p.name) for e in range(layout.experts) for p in layout.projections]
    experts = QExperts(module, layout, dict.fromkeys(matrices, scheme))
    for e, name in matrices:
        experts.load_planes(name, e, codecs.quantize(expert_weight(module, layout, name, e), scheme))
    return experts
"""

READ = """
PAGE = mmap.PAGESIZE

def own_mapping(size):
    # Shared, as the system joins private ones that lie side by side.
    memory = mmap.mmap(-1, size, mmap.MAP_SHARED)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory

def referenced(addresses):
    found, counts = None, {}
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            found = next((name for name, at in addresses.items() if start <= at < end), None)
            assert found is None or start == addresses[found]
        elif first == "Referenced:" and found:
            counts[found] = int(line.split()[1]) * 1024
    return counts

def forget():
    pathlib.Path("/proc/self/clear_refs").write_text("1")
    # An access by way of an entry that the processor still holds is not noted again. All are dropped when many pages
    # are taken away at once.
    memory = own_mapping(512 * PAGE)
    memory[::PAGE] = bytes(512)
    memory.close()

def span(plane, hit, ahead):
    # Pages that hold a byte of an expert that is hit, or one of so many behind it.
    size = plane.nbytes // len(plane)
    return len({page for e in hit for page in range(e * size // PAGE, ((e + 1) * size - 1 + ahead) // PAGE + 1)}) * PAGE

experts = quantized(layer(64, 480, 224), "int4-g32")
mappings, addresses = {}, {}
for name, plane in list(experts.named_buffers()):
    memory = own_mapping(plane.nbytes)
    held = torch.frombuffer(memory, dtype=torch.uint8)[: plane.nbytes].view(plane.dtype).view(plane.shape)
    setattr(experts, name, held.copy_(plane))
    mappings[name], addresses[name] = memory, held.data_ptr()
    assert held.data_ptr() % PAGE == 0 and held.nbytes > 64 * PAGE / 2
whole = {name: -(-plane.nbytes // PAGE) * PAGE for name, plane in experts.named_buffers()}

def step(hit, smallest):
    x, ids = torch.randn(1, 480).bfloat16(), torch.tensor([hit])
    weights = torch.full((1, len(hit)), 1 / len(hit)).bfloat16()
    with native.from_size(smallest):
        experts(x, ids, weights)
        forget()
        experts(x, ids, weights)
    return {
        "read": referenced(addresses),
        "bytes": {name: len(hit) * plane.nbytes // 64 for name, plane in experts.named_buffers()},
        # Compiled kernels ask for what comes next, and some processors (AMD's) note a page that is asked for.
        "pages": {name: span(plane, hit, 0 if smallest else 2048) for name, plane in experts.named_buffers()},
    }

forget()
forgotten = referenced(addresses)
for plane in experts.buffers():
    plane.view(torch.uint8).sum()
result = {"forgotten": forgotten, "all": referenced(addresses), "whole": whole}
result["steps"] = [step(hit, smallest) for hit in json.loads(sys.argv[1]) for smallest in (0, math.inf)]
print(json.dumps(result))
"""

QUANTIZE = """
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

quantized(layer(2, 1024, 512), sys.argv[1])  # imports and caches, once
module = layer(48, 1024, 512)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
before = status("VmRSS")
experts = quantized(module, sys.argv[1])
print(json.dumps({
    "layer": sum(p.nbytes for p in module.parameters()),
    "copy": sum(b.nbytes for b in experts.buffers()),
    "matrix": 512 * 1024 * 4,
    "peak": status("VmHWM") - before,
}))
"""


@pytest.fixture(autouse=True)
def counted_by_the_system() -> None:
    """Linux notes which pages are referenced, where it is built to."""
    path = Path("/proc/self/clear_refs")
    try:
        path.write_text("1")
    except OSError as error:
        pytest.skip(f"this system does not count: {error}")
    if "Referenced:" not in Path("/proc/self/smaps").read_text():
        pytest.skip("this system does not count referenced pages")


def measured(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", LAYER + script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_a_token_reads_the_planes_of_its_experts_and_no_others() -> None:
    """By the compiled product, and by plain torch."""
    found = measured(READ, json.dumps([[3, 17, 18, 40, 0, 63, 9, 27], [31]]))
    assert len(found["whole"]) == 4  # codes and scales of both parameters
    assert not any(found["forgotten"].values())
    assert found["all"] == found["whole"]
    assert len(found["steps"]) == 4
    for step in found["steps"]:
        for name, size in found["whole"].items():
            assert step["bytes"][name] <= step["read"][name] <= step["pages"][name] < size / 4


@pytest.mark.parametrize("spelling", ["int8", "int4-g32"])
def test_quantizing_a_layer_takes_that_layer_and_its_quantized_copy(spelling: str) -> None:
    found = measured(QUANTIZE, spelling)
    assert found["layer"] == 48 * 3 * found["matrix"] / 2
    assert found["copy"] < 0.6 * found["layer"]
    # and what one matrix is quantized by way of
    assert 0.9 * found["copy"] <= found["peak"] <= found["copy"] + 6 * found["matrix"]
