"""A process of its own, for tests that need a GPU which is not there: a request as JSON in, an answer as JSON out.

fusion      names of graphs -> the kernels that Inductor launches for each, and what else it calls
machine     [graph, compute capabilities] -> what Triton's compiler makes of its kernels that read weights
routes      [backend, m, scheme] -> the same of a layer that is compiled by `torch.compile`
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
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import fxquant.compiler
from fxquant.codecs import dequantize, quantize
from fxquant.ops import ABI
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


def _x(m: int, k: int = K) -> Tensor:
    return torch.zeros(m, k, dtype=torch.bfloat16)


GRAPHS = {make.__name__: make for make in (plain, gated, block, attention, epilogue, narrow, wide, siblings)}


def _graph(name: str) -> emulated_cuda.Generated:
    """`kind m spelling [symbolic]`."""
    kind, m, spelling, *rest = name.split()
    fn, inputs = GRAPHS[kind](int(m), spelling)
    return emulated_cuda.generate(fn, inputs, symbolic="symbolic" in rest)


def fusion(names: Sequence[str]) -> list[dict[str, Any]]:
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


def routes(requests: Sequence[Any]) -> list[dict[str, Any]]:
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
    weights = [torch.randn(n, k, generator=generator) for n in rows]
    planes = [quantize(w, scheme, "absmax") for w in weights]
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
    exact = torch.relu(F.linear(x.double(), weight) + added)
    magnitude = F.linear(x.double().abs(), weight.abs()) + (added.abs() if bias else 0)
    step = torch.finfo(x.dtype).eps
    limit = 2 * step * magnitude + 2.0**-23 * k**0.5 * magnitude + 1e-30
    error = ((y.double() - exact).abs() / limit).max().item()
    return {"error": error, "launches": generated.launches, "externs": generated.externs}


def main() -> None:
    what, requests = sys.argv[1], json.loads(sys.stdin.read())
    with tempfile.TemporaryDirectory() as folder:
        emulated_cuda.emulate(folder)
        plain = {"fusion": fusion, "routes": routes}
        answer = plain[what](requests) if what in plain else globals()[what](requests, Path(folder))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
