"""A changed kernel is compiled anew for a model that was compiled before: by the number that every op takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import json, os, sys, torch
from torch._dynamo.utils import counters
import fxquant, fxquant.lowering.linear, fxquant.modules
from fxquant.inductor import as_it_is, lowered

def lowering(added):
    def lower(x, *rest):
        return lowered(torch.ops.aten.add, as_it_is(torch.ops.fxquant.linear.default, x, *rest), added)
    return lower

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 8))
fxquant.quantize(model, "int4-g32", example_inputs=(torch.ones(2, 32),), progress=False)
x, found = torch.ones(2, 32), []
expected = model(x)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[1]  # from here on: our own C++ is built, and lies where it always does
for kernel, abi in ((0.0, 1), (1.0, 1), (1.0, 2)):
    fxquant.lowering.linear.lower, fxquant.modules.ABI = lowering(kernel), 1000 + abi
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        added = (torch.compile(model)(x) - expected).mean().item()
    keys = [key for key in ("fxgraph_cache_hit", "fxgraph_cache_miss") if counters["inductor"][key]]
    found.append((round(added, 3), keys))
print(json.dumps(found))
"""


def test_a_new_number_and_nothing_else_leaves_the_cache(tmp_path: Path) -> None:
    switches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    environment = {**os.environ, **switches, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    old, stale, new = json.loads(run.stdout.splitlines()[-1])
    assert old == [0.0, ["fxgraph_cache_miss"]]
    assert stale == [0.0, ["fxgraph_cache_hit"]]  # why there is a number at all
    assert new == [1.0, ["fxgraph_cache_miss"]]
