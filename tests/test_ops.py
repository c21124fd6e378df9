"""fxquant::linear and fxquant::dequantize against a float64 reference, in every mode torch has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.codecs import dequantize, quantize
from fxquant.errors import ModelError
from fxquant.ops import ABI
from fxquant.scheme import Scheme

SCHEMES = ["int8", "int8-g32", "int4-g32", "int4-g64-asym", "uint4-g32", "nf4", "nf4-dq", "fp4", "fp8", "fp8-tensor"]
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-23}
"""Rounding steps; float64 inputs meet a weight that is dequantized in float32."""


def planes_of(n: int, k: int, spelling: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    scheme = Scheme.parse(spelling)
    planes = quantize(weight, scheme, "absmax")
    return list(planes.values()), dequantize(planes, scheme, n, k, torch.float32)


def linear(x: Tensor, planes: list[Tensor], biases: list[Tensor], spelling: str, rows: list[int]) -> Tensor:
    return torch.ops.fxquant.linear(x, planes, biases, spelling, rows, ABI)


def assert_contract(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The contract: x @ W.T + b, W rounded once to the dtype of x, float32 accumulation, one rounding at the end."""
    reference = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    step = EPSILON[x.dtype]
    bound = 2 * step * magnitude + 2.0**-23 * x.shape[-1] ** 0.5 * magnitude + 1e-30
    assert y.dtype == x.dtype
    assert y.shape == reference.shape
    assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_linear_keeps_the_contract(spelling: str, dtype: torch.dtype) -> None:
    planes, weight = planes_of(48, 128, spelling)
    bias = torch.randn(48, dtype=dtype)
    x = torch.randn(2, 3, 128, dtype=dtype)
    assert_contract(linear(x, planes, [bias], spelling, [48]), x, weight, bias)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    groups=st.integers(1, 4),
    m=st.integers(0, 5),
    spelling=st.sampled_from(SCHEMES),
    seed=st.integers(0, 99),
)
def test_linear_on_any_shape(n: int, groups: int, m: int, spelling: str, seed: int) -> None:
    k = 64 * groups
    planes, weight = planes_of(n, k, spelling, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1))
    assert_contract(linear(x, planes, [], spelling, [n]), x, weight, None)


@pytest.mark.parametrize("spelling", ["int8", "nf4", "fp8", "nf4-dq"])
@pytest.mark.parametrize("k", [1, 7, 65])
def test_schemes_without_groups_take_any_width(spelling: str, k: int) -> None:
    planes, weight = planes_of(5, k, spelling)
    x = torch.randn(4, k)
    assert_contract(linear(x, planes, [], spelling, [5]), x, weight, None)


def test_siblings_in_one_call_equal_single_calls() -> None:
    rows = [48, 16, 16]
    parts = [planes_of(n, 128, "int4-g64", i)[0] for i, n in enumerate(rows)]
    biases = [torch.randn(48), torch.empty(0), torch.randn(16)]
    x = torch.randn(3, 128)
    together = linear(x, [p for part in parts for p in part], biases, "int4-g64", rows)
    alone = [
        linear(x, part, [b] if b.numel() else [], "int4-g64", [n])
        for part, b, n in zip(parts, biases, rows, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone, -1))


def test_gradients_are_those_of_the_dequantized_linear() -> None:
    rows = [24, 8]
    made = [planes_of(n, 64, "int8", i) for i, n in enumerate(rows)]
    weight = torch.cat([w for _, w in made])
    biases = [torch.randn(n, requires_grad=True) for n in rows]
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = linear(x, [p for planes, _ in made for p in planes], biases, "int8", rows)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *biases], seed)
    plain_bias = torch.cat([b.detach() for b in biases]).requires_grad_()
    plain_x = x.detach().requires_grad_()
    want_x, want_bias = torch.autograd.grad(F.linear(plain_x, weight, plain_bias), [plain_x, plain_bias], seed)
    torch.testing.assert_close(got[0], want_x)
    torch.testing.assert_close(torch.cat(got[1:]), want_bias)


@pytest.mark.parametrize("spelling", ["int4-g32", "nf4-dq", "fp8"])
def test_opcheck(spelling: str) -> None:
    planes, _ = planes_of(16, 64, spelling)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(16, requires_grad=True)
    torch.library.opcheck(torch.ops.fxquant.linear, (x, planes, [bias], spelling, [16], ABI))
    torch.library.opcheck(torch.ops.fxquant.dequantize, (planes, spelling, 16, 64, torch.bfloat16, ABI))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic: bool) -> None:
    planes, _ = planes_of(16, 64, "int4-g32")

    def f(x: Tensor) -> Tensor:
        return F.silu(linear(x * 2, planes, [], "int4-g32", [16]))

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for m in (1, 3, 7):
        x = torch.randn(m, 64)
        torch.testing.assert_close(compiled(x), f(x))


def test_autocast_lowers_the_input_alone() -> None:
    planes, weight = planes_of(16, 64, "fp8")
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, planes, [], "fp8", [16])
    assert_contract(y, x.bfloat16(), weight, None)


def test_meta_gives_shapes() -> None:
    planes, _ = planes_of(16, 64, "int4-g32")
    y = linear(torch.empty(2, 64, device="meta"), [p.to("meta") for p in planes], [], "int4-g32", [16])
    assert (y.shape, y.device.type) == ((2, 16), "meta")


def test_planes_that_do_not_fit_are_refused() -> None:
    planes, _ = planes_of(16, 64, "int4-g32")
    with pytest.raises(ModelError, match="K=32"):
        linear(torch.randn(2, 32), planes, [], "int4-g32", [16])
    with pytest.raises(ModelError, match="N=8"):
        linear(torch.randn(2, 64), planes, [], "int4-g32", [8])
