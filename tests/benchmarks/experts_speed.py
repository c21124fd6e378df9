"""A layer of a mixture of experts on a CPU: `QExperts` beside transformers' eager loop, `batched_mm` and `grouped_mm`.

    python tests/benchmarks/experts_speed.py [--scheme int4] [--tokens 1 8 64 256] [--rounds 15] [--json FILE]

The experts of Qwen3-MoE: 128 of them, 8 to a token, 2048 to 768 and back. Inputs are bfloat16, and so are the weights
of transformers' ways; ours are planes. Every way runs as it is and, but for the eager loop, which has no whole graph,
under `torch.compile`.

All run once in every round, in turn the first, on the tokens of the round. As in a model, where layer follows on layer,
code is in a cache and weights are not: before it is timed, each runs on the same tokens with the experts that are hit
least, and then with experts renamed, as many hit by as many tokens, but not those that another way has just read.
Ratios are to the fastest rival of the same round, in either form: their median, least and most. Before any is printed,
all results are compared with float64. A way that copies weights is left out where these take more than
`--largest-copy`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from side_by_side import Timed, report
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fxquant import codecs
from fxquant.expert_layouts import ExpertsLayout
from fxquant.expert_modules import QExperts
from fxquant.experts import expert_weight, layout_of
from fxquant.scheme import Scheme

WAYS = {"eager": "eager loop", "batched_mm": "batched_mm", "grouped_mm": "grouped_mm"}
LARGEST_ERROR = 0.01
"""Of a result, in the 2-norm: bfloat16 rounds what is between both products by 2^-9 of it, several times."""

Arguments = tuple[Tensor, Tensor, Tensor]


@dataclass
class Way(Timed):
    """One way to compute the layer."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: Callable[[int, str], Tensor]
    """Of an expert and a projection, float32."""

    def time(self, x: Tensor, ids: Tensor, weights: Tensor, experts: int) -> None:
        names = torch.randperm(experts)
        ids, hits = names[ids], ids.view(-1).bincount(minlength=experts)
        rest = names[hits.argsort()[: ids.shape[1]]].expand_as(ids).contiguous()
        self.run(x, rest, weights)
        start = time.perf_counter()
        self.run(x, ids, weights)
        self.seconds.append(time.perf_counter() - start)


def config_of(options: argparse.Namespace, way: str) -> Qwen3MoeConfig:
    config = Qwen3MoeConfig(
        num_experts=options.experts,
        num_experts_per_tok=options.top,
        hidden_size=options.hidden,
        moe_intermediate_size=options.inner,
    )
    config._experts_implementation = way
    return config


def original(options: argparse.Namespace) -> nn.Module:
    module = Qwen3MoeExperts(config_of(options, "eager")).bfloat16().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


def layout(module: nn.Module) -> ExpertsLayout:
    found = layout_of(module)
    assert isinstance(found, ExpertsLayout), found
    return found


def quantized(module: nn.Module, scheme: Scheme) -> QExperts:
    found = layout(module)
    matrices = [(e, p.name) for e in range(found.experts) for p in found.projections]
    experts = QExperts(module, found, dict.fromkeys(matrices, scheme))
    for e, name in matrices:
        experts.load_planes(name, e, codecs.quantize(expert_weight(module, found, name, e), scheme, "absmax"))
    return experts


def ways(module: nn.Module, options: argparse.Namespace, tokens: int) -> list[Way]:
    scheme, found = Scheme.parse(options.scheme), layout(module)
    experts = quantized(module, scheme)

    def ours(e: int, name: str) -> Tensor:
        _, n, k = module.get_parameter(found.projection(name).parameter).shape
        return codecs.dequantize(experts.planes_of(name, e), scheme, n // found.projection(name).parts, k)

    def theirs(e: int, name: str) -> Tensor:
        return expert_weight(module, found, name, e).float()

    def compiled(run: nn.Module) -> Callable[..., Tensor]:
        result: Callable[..., Tensor] = torch.compile(run, fullgraph=True, dynamic=False)
        return result

    result = [
        Way(options.scheme, False, experts, ours),
        Way(f"{options.scheme}, compiled", False, compiled(experts), ours),
    ]
    copied = tokens * options.top * max(p[0].nbytes for p in module.parameters())
    for way, name in WAYS.items():
        if way == "batched_mm" and copied > options.largest_copy * 1e9:
            continue
        other = Qwen3MoeExperts(config_of(options, way)).to("meta")
        other._parameters = dict(module._parameters)
        result.append(Way(name, True, other, theirs))
        if way != "eager":
            result.append(Way(f"{name}, compiled", True, compiled(other), theirs))
    return result


def routed(tokens: int, options: argparse.Namespace) -> Arguments:
    weights, ids = torch.rand(tokens, options.experts).softmax(-1).topk(options.top)
    return torch.randn(tokens, options.hidden).bfloat16(), ids, (weights / weights.sum(-1, keepdim=True)).bfloat16()


def exact(way: Way, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, on the weights that this way has."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ way.weight(e, name).double().T for name in ("gate_proj", "up_proj"))
        inner = nn.functional.silu(gate) * up
        of_expert = inner @ way.weight(e, "down_proj").double().T
        y.index_add_(0, token, of_expert * weights[token, slot].double().unsqueeze(-1))
    return y


def wrong(methods: Sequence[Way], arguments: Arguments) -> list[str]:
    """Ways whose result is further from float64 than roundings to bfloat16 explain; all are warmed up by this."""
    references = {way.weight: exact(way, *arguments) for way in methods}
    found = []
    for way in methods:
        reference = references[way.weight]
        error = ((way.run(*arguments).double() - reference).norm() / reference.norm()).item()
        if not error <= LARGEST_ERROR:
            found.append(f"{way.name}, {len(arguments[0])} tokens: relative error {error:.2e}")
    return found


def run_rounds(methods: Sequence[Way], tokens: int, options: argparse.Namespace) -> None:
    for number in range(options.rounds):
        arguments = routed(tokens, options)
        for i in range(len(methods)):
            methods[(number + i) % len(methods)].time(*arguments, options.experts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--tokens", type=int, nargs="*", default=(1, 8, 64, 256))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top", type=int, default=8, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--largest-copy", type=float, default=4, help="GB that a way may copy in one call")
    parser.add_argument("--json", type=Path, help="write every time and ratio there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console, lines = Console(width=None if sys.stdout.isatty() else 200), []
    versions = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads"
    console.print(f"{versions}, {options.rounds} rounds")
    with torch.no_grad():
        module = original(options)
        for tokens in options.tokens:
            torch.compiler.reset()
            methods = ways(module, options, tokens)
            if found := wrong(methods, routed(tokens, options)):
                sys.exit("not correct, so no speeds:\n  " + "\n  ".join(found))
            run_rounds(methods, tokens, options)
            lines += report(methods, tokens, "tokens", console)
            for name in set(WAYS.values()) - {way.name for way in methods}:
                console.print(f"{name} is left out: it would copy more than {options.largest_copy:g} GB of weights")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "scheme": options.scheme, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
