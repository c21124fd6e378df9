"""How long the first use takes: of the C++ kernels, and of `torch.compile` on a quantized model.

    python tests/benchmarks/compile_time.py [--model tiny] [--rounds 3] [--json FILE]

Every round is a process with an empty folder as Inductor's cache (`cold`), and another with the same folder (`warm`).
Imports are not counted, nor is what follows the first call. The codecs and the products of C++ come first, so the time
of a model is that of its own code. It is compiled for 16 tokens, and what it gives is compared with what it gave
before. bfloat16 is the same model, not quantized, with a folder of its own. What comes first, the codecs and bfloat16,
is when Inductor tries which instructions the compiler knows. Models are those of `generate_models.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from linear_speed import versions
from torch import Tensor

from fxquant.tables import Table

LARGEST_ERROR = 0.03
"""Of logits, compiled against not: bfloat16 is rounded at other places."""


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def product(spelling: str, planes: dict[str, Tensor]) -> float:
    """Seconds of the first product of a weight; it is what its planes say."""
    from fxquant import codecs
    from fxquant.ops import ABI
    from fxquant.scheme import Scheme

    x, held = torch.eye(512)[:4], list(planes.values())
    seconds, y = timed(lambda: torch.ops.fxquant.linear(x, held, [], spelling, [512], ABI))
    torch.testing.assert_close(y, codecs.dequantize(planes, Scheme.parse(spelling), 512, 512)[:, :4].T)
    return seconds


def kernels() -> dict[str, float]:
    """Seconds of the first quantization and the first products, in which C++ is compiled."""
    import torch._inductor.codecache

    from fxquant import codecs
    from fxquant.scheme import Scheme

    weight, scheme = torch.randn(512, 512), Scheme.parse("int4")
    start = time.perf_counter()
    planes = codecs.quantize(weight, scheme, "absmax")
    seconds = time.perf_counter() - start
    return {
        "C++ codecs": seconds,
        "C++ products": product("int4", planes),
        "C++ products of int8 codes": product("int4+int8", planes),
    }


def model(name: str, quantized: bool) -> float:
    """Seconds of the first call of a compiled model.

    Raises:
        SystemExit: it does not give what it gave before.
    """
    import generate_models as models

    made = models.build(name)
    if quantized:
        models.by_fxquant(made, "int4-g128")
    wanted, run = models.logits(made), torch.compile(made, fullgraph=True)
    seconds, _ = timed(lambda: models.logits(run))
    if not (error := models.relative_error(models.logits(run), wanted)) <= LARGEST_ERROR:
        sys.exit(f"not correct, so no times: {name}: logits are off by {error:.2e}")
    return seconds


def child(what: str, name: str) -> None:
    with torch.no_grad():
        if what == "bf16":
            found = {f"torch.compile, {name}, bf16": model(name, quantized=False)}
        else:
            found = kernels()
            found[f"torch.compile, {name}, int4-g128"] = model(name, quantized=True)
    print(json.dumps(found))


def run(what: str, name: str, cache: str) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--child", what, "--model", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, llama-3.2-1b or qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every time there")
    parser.add_argument("--child", choices=("fxquant", "bf16"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model)
        return
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for what in ("fxquant", "bf16"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    for part, seconds in run(what, options.model, cache).items():
                        times.setdefault(part, {"cold": [], "warm": []})[state].append(seconds)
    rows = [
        (part, *(f"{statistics.median(t):.2f} ({min(t):.2f})" for t in found.values())) for part, found in times.items()
    ]
    about = f"{versions(torch.get_num_threads())}, {options.rounds} rounds"
    print(
        Table("first use, seconds: median (least)", ("what", "cold", "warm"), tuple(rows), frozenset({1, 2}), (about,))
    )
    if options.json:
        options.json.write_text(json.dumps({"versions": about, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
