"""A process of its own, for tests that need a GPU which is not there: requests as JSON in, answers as JSON out.

By kind of request:

fusion      names of graphs -> the kernels that Inductor launches for each, and what else it calls
machine     [graph, compute capabilities] -> what Triton's compiler makes of its kernels that read weights
routes      [backend, m, scheme] -> the same of a layer that is compiled by `torch.compile`
expert_numbers, gated_numbers -> the same of experts
numbers     [scheme, m, rows, k, dtype, bias, searched] -> the largest error, in units of the contract
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import emulated_cuda
import offline_triton
import torch
import torch.nn.functional as F
from random_planes import random_planes
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import fxquant.compiler
from fxquant.activation_codecs import dequantize_activation, quantize_activation
from fxquant.codecs import dequantize, quantize
from fxquant.expert_ops import ABI
from fxquant.scheme import Scheme

N, K, NARROW = 8192, 2048, 1024
Graph = tuple[Callable[..., Any], list[Tensor]]


def linear(x: Tensor, planes: Sequence[Tensor], spelling: str, rows: Sequence[int], biases: Sequence[Tensor] = ()):
    return torch.ops.fxquant.linear(x, list(planes), list(biases), spelling, list(rows), ABI)


def shapes(spelling: str, n: int, k: int) -> list[Tensor]:
    return [torch.zeros(spec.shape, dtype=spec.dtype) for spec in Scheme.parse(spelling).planes(n, k).values()]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def plain(m: int, spelling: str) -> Graph:
    """One weight, with an activation behind it."""
    return lambda x, *p: F.silu(linear(x, p, spelling, [N])), [_x(m), *shapes(spelling, N, K)]


def narrow(m: int, spelling: str) -> Graph:
    """As `epilogue`, of so few rows that most of a GPU would have nothing to do."""
    x, bias, y = _x(m), _x(1, NARROW).view(-1), _x(m, NARROW)

    def fn(x: Tensor, bias: Tensor, y: Tensor, *p: Tensor) -> Tensor:
        return F.gelu(linear(x, p, spelling, [NARROW], [bias])) * y

    return fn, [x, bias, y, *shapes(spelling, NARROW, K)]


def siblings(m: int, spelling: str) -> Graph:
    """Three weights in one call."""
    planes = [plane for _ in range(3) for plane in shapes(spelling, N, K)]
    return lambda x, *p: linear(x, p, spelling, [N, N, N]), [_x(m), *planes]


def gated(m: int, spelling: str) -> Graph:
    first = len(shapes(spelling, N, K))
    planes = [*shapes(spelling, N, K), *shapes(spelling, N, K)]

    def fn(x: Tensor, *p: Tensor) -> Tensor:
        return F.silu(linear(x, p[:first], spelling, [N])) * linear(x, p[first:], spelling, [N])

    return fn, [_x(m), *planes]


def block(m: int, spelling: str) -> Graph:
    """Norm, gate and up, down, residual."""
    first = len(shapes(spelling, N, K))
    planes = [*shapes(spelling, N, K), *shapes(spelling, N, K), *shapes(spelling, K, N)]

    def fn(x: Tensor, weight: Tensor, *p: Tensor) -> Tensor:
        h = norm(x, weight)
        gate, up = (linear(h, part, spelling, [N]) for part in (p[:first], p[first : 2 * first]))
        return x + linear(F.silu(gate) * up, p[2 * first :], spelling, [K])

    return fn, [_x(m), _x(1).view(-1), *planes]


def attention(m: int, spelling: str) -> Graph:
    """Three weights in three calls."""
    first = len(shapes(spelling, N, K))
    planes = [plane for _ in range(3) for plane in shapes(spelling, N, K)]

    def fn(x: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x, p[i * first : (i + 1) * first], spelling, [N]) for i in range(3))

    return fn, [_x(m), *planes]


def epilogue(m: int, spelling: str) -> Graph:
    def fn(x: Tensor, bias: Tensor, y: Tensor, *p: Tensor) -> Tensor:
        return F.gelu(linear(x, p, spelling, [N], [bias])) * y

    return fn, [_x(m), _x(1, N).view(-1), _x(m, N), *shapes(spelling, N, K)]


def wide(m: int, spelling: str) -> Graph:
    return lambda x, *p: linear(x, p, spelling, [N]), [_x(m).float(), *shapes(spelling, N, K)]


def experts(m: int, spelling: str) -> Graph:
    """Two of eight experts for every token, with an activation behind them."""
    ids = torch.zeros(m, 2, dtype=torch.int64)
    planes = [torch.stack([plane] * 8) for plane in shapes(spelling, 512, K)]

    def fn(x: Tensor, ids: Tensor, *p: Tensor) -> Tensor:
        return F.silu(torch.ops.fxquant.experts(x, ids, list(p), [], spelling, 512, 8, ABI))

    return fn, [_x(m), ids, *planes]


def gated_experts(m: int, spelling: str) -> Graph:
    ids, weights = torch.zeros(m, 2, dtype=torch.int64), _x(m, 2)
    first, second = ([torch.stack([plane] * 8) for plane in shapes(spelling, *size)] for size in ((1024, K), (K, 512)))
    count = len(first)

    def fn(x: Tensor, ids: Tensor, weights: Tensor, *p: Tensor) -> Tensor:
        planes = list(p[:count]), list(p[count:])
        return torch.ops.fxquant.gated_experts(x, ids, weights, *planes, spelling, spelling, 512, 8, ABI)

    return fn, [_x(m), ids, weights, *first, *second]


def shared(m: int, spelling: str) -> Graph:
    """Two weights of different schemes, which read the same codes."""
    first = len(shapes(spelling, N, K))

    def fn(x: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        codes, scales = torch.ops.fxquant.quantize_activation(x, "int8", None, ABI)
        parts = ((spelling, p[:first]), ("int8+int8", p[first:]))
        on_codes = torch.ops.fxquant.linear_on_codes
        return tuple(on_codes(x, codes, scales, list(own), [], scheme, [N], ABI) for scheme, own in parts)

    return fn, [_x(m), *shapes(spelling, N, K), *shapes("int8+int8", N, K)]


def _x(m: int, k: int = K) -> Tensor:
    return torch.zeros(m, k, dtype=torch.bfloat16)


GRAPHS = {
    make.__name__: make
    for make in (plain, gated, block, attention, epilogue, narrow, wide, siblings, shared, experts, gated_experts)
}


def _graph(name: str) -> emulated_cuda.Generated:
    """`kind m spelling [symbolic]`."""
    kind, m, spelling, *rest = name.split()
    fn, inputs = GRAPHS[kind](int(m), spelling)
    return emulated_cuda.generate(fn, inputs, symbolic="symbolic" in rest)


def fusion(names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    return [_seen(_graph(name)) for name in names]


def _seen(generated: emulated_cuda.Generated) -> dict[str, Any]:
    """Kernels in the order of their launches, those of them that read a weight, and what else is called."""
    weights = [name for name in generated.launches if emulated_cuda.reads_weights(generated.kernels[name])]
    return {"launches": generated.launches, "weights": weights, "externs": generated.externs}


class Layer(nn.Module):
    """Norm, queries, keys and values, a projection of what they give, norm, and a gated MLP: a layer of a decoder."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x, self.norms[0])
        x = x + self.o(torch.sigmoid(self.q(h) * self.k(h)) * self.v(h))
        h = norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def routes(requests: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """A layer, quantized, then compiled by a user's own two calls, in which Inductor sees a GPU."""
    return [_seen(_route(*request)) for request in requests]


BACKENDS = {"fxquant": fxquant.compiler.backend, "inductor": lookup_backend("inductor")}


def _route(backend: str, m: int, spelling: str) -> emulated_cuda.Generated:
    with torch.device("meta"):
        model, x = Layer(256, 768).bfloat16(), _x(m, 256)
    model = fxquant.quantize(model, spelling, example_inputs=(x,), progress=False)
    return emulated_cuda.compiled(model, x, BACKENDS[backend])


def machine(requests: Sequence[Any], folder: Path) -> list[list[dict[str, Any]]]:
    answers = []
    for name, capabilities in requests:
        kernels = offline_triton.compile_kernels(_graph(name), capabilities, folder)
        answers.append(
            [
                {
                    "name": kernel.name,
                    "capability": kernel.capability,
                    "registers": kernel.registers,
                    "spilled": kernel.spilled,
                    "shared": kernel.shared,
                    "16-byte loads": kernel.count(r"\bld\.global[\w:.]*\.v4\.b32"),
                    "16-byte copies": kernel.count(r"\bcp\.async\.cg\.shared\.global[\w:.]* .*, 0x10\b"),
                    "tensor cores": kernel.count(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)"),
                }
                for kernel in kernels
            ]
        )
    return answers


def numbers(requests: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    return [_numbers(*request, folder) for request in requests]


def _numbers(
    spelling: str, m: int, rows: list[int], k: int, dtype: str, bias: bool, searched: bool, folder: Path
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(m + k + sum(rows))
    x = torch.randn(m, k, generator=generator).to(getattr(torch, dtype))
    scheme = Scheme.parse(spelling)
    planes = [random_planes(scheme, n, k, seed=i) for i, n in enumerate(rows)]
    flat = [plane for part in planes for plane in part.values()]
    # Siblings with and without a bias stand side by side.
    biases = [torch.randn(n if i % 2 == 0 else 0, generator=generator).to(x.dtype) for i, n in enumerate(rows)]
    biases = biases if bias else []

    def fn(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.relu(linear(x, rest[: len(flat)], spelling, rows, rest[len(flat) :]))

    config = {"max_autotune_gemm": True, "benchmark_epilogue_fusion": False} if searched else {}
    generated = emulated_cuda.generate(fn, [x, *flat, *biases], config)
    (y,) = offline_triton.interpret(generated, [x, *flat, *biases], folder)
    weight = torch.cat([dequantize(p, scheme, n, k) for p, n in zip(planes, rows, strict=True)]).double()
    added = torch.cat([b if b.numel() else torch.zeros(n) for b, n in zip(biases, rows, strict=True)]) if bias else 0
    pairs = [(_multiplied(x, scheme, part), w) for part, w in zip(planes, weight.split(rows), strict=True)]
    exact = torch.relu(torch.cat([F.linear(v, w) for v, w in pairs], -1) + added)
    magnitude = torch.cat([F.linear(v.abs(), w.abs()) for v, w in pairs], -1)
    magnitude = magnitude + (added.abs() if bias else 0)
    step = torch.finfo(x.dtype).eps
    limit = 2 * step * magnitude + 2.0**-23 * k**0.5 * magnitude + 1e-30
    error = ((y.double() - exact).abs() / limit).max().item()
    return {"error": error, "launches": generated.launches, "externs": generated.externs}


def _multiplied(x: Tensor, scheme: Scheme, planes: dict[str, Tensor]) -> Tensor:
    """What x is, or stands for where it is quantized, float64."""
    if scheme.activation is None:
        return x.double()
    coded = quantize_activation(x, scheme.activation, planes.get("input_scale"))
    return dequantize_activation(*coded, scheme.activation).double()


def expert_numbers(requests: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    return [_expert_numbers(*request, folder) for request in requests]


def _expert_numbers(
    spelling: str, tokens: int, n: int, k: int, dtype: str, per_slot: bool, folder: Path
) -> dict[str, Any]:
    """Of five experts, three are hit, with ids beside them that are no experts'."""
    generator = torch.Generator().manual_seed(tokens + n + k)
    ids = torch.tensor([0, 4, -1, 2, 5, 4])[torch.arange(tokens * 2) % 6].view(tokens, 2)
    x = torch.randn(*ids.shape[: 1 + per_slot], k, generator=generator).to(getattr(torch, dtype))
    scheme, bias = Scheme.parse(spelling), torch.randn(5, n, generator=generator).to(x.dtype)
    each = [quantize(torch.randn(n, k, generator=generator), scheme, "absmax") for _ in range(5)]
    planes = [torch.stack([part[name] for part in each]) for name in scheme.planes(n, k)]

    def fn(x: Tensor, ids: Tensor, bias: Tensor, *p: Tensor) -> Tensor:
        return torch.relu(torch.ops.fxquant.experts(x, ids, list(p), [bias], spelling, n, 5, ABI))

    generated = emulated_cuda.generate(fn, [x, ids, bias, *planes])
    (y,) = offline_triton.interpret(generated, [x, ids, bias, *planes], folder)
    weights = torch.stack([dequantize(part, scheme, n, k) for part in each]).double()
    present, at = ((ids >= 0) & (ids < 5)).unsqueeze(-1), ids.clamp(0, 4)
    wide = _multiplied(x if per_slot else x.unsqueeze(1), scheme, {}).expand(*ids.shape, k).unsqueeze(-2)
    exact = torch.relu((wide * weights[at]).sum(-1) + bias[at].double()) * present
    magnitude = (wide.abs() * weights[at].abs()).sum(-1) + bias[at].double().abs()
    limit = 2 * torch.finfo(x.dtype).eps * magnitude + 2.0**-23 * k**0.5 * magnitude + 1e-30
    return {
        "error": ((y.double() - exact).abs() / limit).max().item(),
        "absent": y[~present.squeeze(-1)].abs().sum().item(),
        "externs": generated.externs,
    }


def gated_numbers(requests: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    return [_gated_numbers(*request, folder) for request in requests]


def _gated_numbers(spelling: str, tokens: int, inner: int, k: int, folder: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + inner + k)
    ids = torch.tensor([0, 2, -1, 1, 3, 2])[torch.arange(tokens * 2) % 6].view(tokens, 2)
    x, router = torch.randn(tokens, k, generator=generator), torch.rand(tokens, 2, generator=generator)
    scheme, sizes = Scheme.parse(spelling), [(2 * inner, k), (k, inner)]
    each = [
        [quantize(torch.randn(*size, generator=generator) / 8, scheme, "absmax") for _ in range(3)] for size in sizes
    ]
    stacks = [[torch.stack([part[name] for part in parts]) for name in parts[0]] for parts in each]
    first = len(stacks[0])

    def fn(x: Tensor, ids: Tensor, router: Tensor, *p: Tensor) -> Tensor:
        planes = list(p[:first]), list(p[first:])
        return torch.ops.fxquant.gated_experts(x, ids, router, *planes, spelling, spelling, inner, 3, ABI)

    inputs = [x, ids, router, *stacks[0], *stacks[1]]
    generated = emulated_cuda.generate(fn, inputs)
    (y,) = offline_triton.interpret(generated, inputs, folder)
    one, two = (
        torch.stack([dequantize(part, scheme, *size) for part in parts]).double()
        for parts, size in zip(each, sizes, strict=True)
    )
    at = ids.clamp(0, 2)
    gate, up = (one[at] @ x.double().view(tokens, 1, k, 1)).squeeze(-1).chunk(2, -1)
    outputs = (two[at] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    exact = (outputs * (router * ((ids >= 0) & (ids < 3))).unsqueeze(-1)).sum(1)
    error = (y.double() - exact).abs().max() / exact.abs().max()
    return {"error": error.item(), "externs": generated.externs, "launches": generated.launches}


KINDS: dict[str, Callable[[Sequence[Any], Path], list[Any]]] = {
    "fusion": fusion,
    "routes": routes,
    "machine": machine,
    "numbers": numbers,
    "expert_numbers": expert_numbers,
    "gated_numbers": gated_numbers,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        emulated_cuda.emulate(folder)
        asked = json.loads(sys.stdin.read())
        answers = {kind: KINDS[kind](requests, Path(folder)) for kind, requests in asked.items()}
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()
