"""One contract for every scheme: `fxquant::linear` is `x @ dequantize(W).T + b`, eager and compiled, there and back.

The planes are random, so that schemes which can only be read are held to it too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_planes import random_planes
from torch import Tensor

from fxquant.codecs import dequantize
from fxquant.ops import ABI
from fxquant.scheme import NAMES, Scheme

SPELLINGS = [
    *(name for name in NAMES if Scheme.parse(name).activation is None),
    *(f"{sign}int{bits}-g32" for bits in (2, 3, 4, 5, 6, 8) for sign in ("", "u")),
    "int8", "int8-tensor", "int8-b16x32", "int4-b8x0", "int4-flat48", "int4-g64-asym", "uint3-b3x5",
    "uint4-g64-fzero-fp16", "uint5-g32-fzero", "int8-bias", "uint2-g16-bias-bf16", "int4-g32-e8m0",
    "int4-g32-e4m3*fp32", "int4-g32-e4m3", "uint4-g32-bias-u4*bf16.g128", "int6-g16-i8*fp32",
    "nf4", "nf4-dq", "nf4-g64", "fp4-dq", "fp4-g32-fp16", "table(-1,-0.25,0.25,1)-g16", "table(-2,1)-row",
    "fp8", "fp8-b128x128", "fp8-g64-fp16", "fp8e5m2-tensor", "ternary-g64", "trit-g32-bf16", "e2m1-g16-e4m3",
    "vq8.8x8-fp16", "vq6.4x4s8-g64-bf16", "vq5x1r8-perm-colscale-colbias-fp16", "vq4x8c2-fp16",
    "int4-g64-perm", "int4-g64-colscale", "nf4-g64-perm-colscale-colbias",
]  # fmt: skip
N, K = 48, 256


def linear(x: Tensor, planes: list[Tensor], bias: Tensor, spelling: str) -> Tensor:
    return torch.ops.fxquant.linear(x, planes, [bias], spelling, [N], ABI)


def test_every_name_is_here() -> None:
    assert {name for name in NAMES if Scheme.parse(name).activation is None} <= set(SPELLINGS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_and_backward(spelling: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(spelling)
    planes = random_planes(scheme, N, K)
    weight = dequantize(planes, scheme, N, K).double()
    assert weight.isfinite().all()
    assert weight.count_nonzero() > N * K / 4
    torch.manual_seed(0)
    x, bias = torch.randn(3, K).to(dtype).requires_grad_(), torch.randn(N).to(dtype).requires_grad_()
    y = linear(x, list(planes.values()), bias, spelling)
    y.backward(torch.ones_like(y))
    step = torch.finfo(dtype).eps
    magnitude = F.linear(x.detach().double().abs(), weight.abs(), bias.detach().double().abs())
    reference = F.linear(x.detach().double(), weight, bias.detach().double())
    assert ((y.double() - reference).abs() <= (2 * step + K * 2.0**-24) * magnitude).all()
    assert x.grad is not None
    assert bias.grad is not None
    assert ((x.grad.double() - weight.sum(0)).abs() <= (2 * step + N * 2.0**-24) * weight.abs().sum(0)).all()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3.0))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_compiled_is_eager(spelling: str) -> None:
    """One graph, forward and backward, the same numbers."""
    torch._dynamo.reset()
    planes = list(random_planes(Scheme.parse(spelling), N, K).values())
    x, bias = torch.randn(3, K), torch.randn(N)
    results = []
    for run in (linear, torch.compile(linear, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf, planes, bias, spelling)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))
