"""How fast a checkpoint is quantized tensor by tensor, in how much memory: `python tests/benchmarks/stream_speed.py`.

Writes a Llama of random bfloat16 weights in shards (4 GB by default; the folder needs twice that), quantizes it from a
warm cache in a process of its own, once without interruption and once killed twice, and compares the files.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fxquant.tables import Table
from fxquant.unfinished import JOURNAL, unfinished_path

RUN = """
import json, re, sys, time
import torch, transformers
from transformers import LlamaForCausalLM
from fxquant.conversion import convert
begin = time.perf_counter()
convert(sys.argv[1], sys.argv[2], sys.argv[4], recipe=sys.argv[3], progress=False)
seconds = time.perf_counter() - begin
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def write_llama(folder: Path, nbytes: int) -> int:
    """A Llama of 4096 by 11008 with as many layers as these bytes hold; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    layers = max(1, round((nbytes - 4 * 32000 * 4096) / layer))
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=32000, dtype=torch.bfloat16)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {name: torch.empty(t.shape, dtype=t.dtype).normal_(0, 0.02) for name, t in model.state_dict().items()}
    written = sum(tensor.nbytes for tensor in state.values())
    model.save_pretrained(folder, state_dict=state, max_shard_size="1GB")
    return written


def run(source: Path, out: Path, recipe: str, to: str) -> dict[str, float]:
    """Quantize in another process; seconds of the call and peak memory of the process."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(source), str(out), recipe, to]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    data: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return data | {"process": time.perf_counter() - begin}


def kill_after(source: Path, out: Path, recipe: str, to: str, units: int) -> int:
    """Quantize, and kill the process when so many units more are in the journal; how many are."""
    command = [sys.executable, "-c", RUN, str(source), str(out), recipe, to]
    journal = unfinished_path(out) / JOURNAL

    def done() -> int:
        return journal.read_text().count('"unit"') if journal.exists() else 0

    wanted = done() + units
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and done() < wanted:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--to", default="fxquant", help="format of the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        nbytes = write_llama(folder / "source", int(options.gigabytes * 1e9))
        rows = []
        for number in range(options.rounds):
            out = folder / f"whole{number}"
            for file in sorted((folder / "source").iterdir()):
                file.read_bytes()  # warm
            found = run(folder / "source", out, options.recipe, options.to)
            rates = [f"{nbytes / found[what] / 1e9:.2f} GB/s" for what in ("seconds", "process")]
            rows.append((str(number + 1), *rates, f"{found['peak'] / 1e9:.2f} GB"))
        out = folder / "killed"
        marks = [kill_after(folder / "source", out, options.recipe, options.to, units) for units in (15, 15)]
        run(folder / "source", out, options.recipe, options.to)
        names = sorted(p.name for p in out.iterdir())
        same = names == sorted(p.name for p in (folder / "whole0").iterdir())
        same &= filecmp.cmpfiles(out, folder / "whole0", names, shallow=False)[0] == names
    table = Table(
        title=f"{nbytes / 1e9:.2f} GB to {options.recipe} in {options.to}, {os.cpu_count()} cores",
        columns=("round", "of input", "with imports", "peak memory"),
        rows=tuple(rows),
        right=frozenset({1, 2, 3}),
        notes=(f"killed after {marks[0]} and {marks[1]} units, and gone on with: the same bytes: {same}",),
    )
    print(table)
    sys.exit(not same)


if __name__ == "__main__":
    main()
