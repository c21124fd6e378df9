"""One model for `generate_speed.py`: builds, quantizes and compiles it, then generates for every line of its input.

python tests/benchmarks/generate_worker.py MODEL WAY THREADS TOKENS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

WAYS = {
    "bf16": "bf16, compiled",
    "bf16 frozen": "bf16, compiled and frozen (oneDNN packs the weights)",
    "fxquant int4-g128": "fxquant int4-g128, compiled",
    "fxquant int4-g128 merged": 'fxquant int4-g128, compiled with backend="fxquant"',
    "torchao": "torchao int4 (prototype for CPUs), compiled",
    "bitsandbytes": "bitsandbytes nf4, compiled",
}


class Clock:
    """A stopping criterion that never stops, and notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def prepare(name: str, way: str) -> tuple[Any, dict[str, Any]]:
    """The model, compiled but not yet run, and what is known about it."""
    import generate_models as models

    model = models.build(name)
    shapes = [(linear.out_features, linear.in_features) for _, linear in models.linears(model)]
    about: dict[str, Any] = {"token bytes": models.token_bytes(shapes, way)}
    if not way.startswith("bf16"):
        wanted = models.logits(model)
        if way.startswith("fxquant"):
            models.by_fxquant(model, way.split()[1])
            about["error"] = models.against_its_own_weights(model)
        else:
            {"torchao": models.by_torchao, "bitsandbytes": models.by_bitsandbytes}[way](model)
        about["logits"] = models.relative_error(models.logits(model), wanted)
    if way.endswith("frozen"):
        from torch._inductor import config

        config.freezing = True
    backend = "fxquant" if way.endswith("merged") else "inductor"
    model.forward = torch.compile(model.forward, fullgraph=way != "bitsandbytes", backend=backend)
    return model, about


def generate(model: Any, tokens: int) -> float:
    """Tokens per second after the first."""
    from generate_models import PROMPT

    clock = Clock()
    found = model.generate(
        PROMPT,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    assert found.shape[1] == PROMPT.shape[1] + tokens == PROMPT.shape[1] + len(clock.times)
    return (tokens - 1) / (clock.times[-1] - clock.times[0])


def main() -> None:
    name, way, threads, tokens = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with torch.no_grad():
        model, about = prepare(name, way)
        start = time.perf_counter()
        generate(model, int(tokens))
        about["compile"] = time.perf_counter() - start
        generate(model, int(tokens))
        print(json.dumps(about), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"tokens per second": generate(model, int(tokens))}), flush=True)


if __name__ == "__main__":
    main()
