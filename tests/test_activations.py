"""Quantized activations: codes against their definition, products against float64, LLM.int8 against bitsandbytes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant import quantized_matmul
from fxquant.activation_codecs import (
    FLOOR,
    LARGEST,
    dequantize_activation,
    outlier_features,
    quantize_activation,
)
from fxquant.codecs import dequantize
from fxquant.errors import ModelError, SchemeError
from fxquant.modules import QLinear
from fxquant.ops import ABI
from fxquant.scheme import Scheme
from fxquant.scheme.activations import Activation, parse_activation

ACTIVATIONS = ["int8", "fp8", "int8-g16", "fp8-g32", "int8-static", "fp8-static", "int8-outlier6"]
SCHEMES = [
    "int8+int8",
    "int8-tensor+int8",
    "int8-bf16+int8",
    "int8-g32+int8",
    "int4-g32+int8",
    "int4-g32-asym+int8-g16",
    "fp8+fp8",
    "fp8-b32x32+fp8-g32",
    "int8+int8-static",
    "fp8+fp8-static",
    "llm-int8",
    "nf4+int8-outlier6",
    "mxfp4+fp8",
    "nvfp4+fp8",
    "uint8+int8",
    "ternary+int8",
]
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 0.0}
DTYPES = list(HALF_ULP)


def activation_of(spelling: str) -> Activation:
    found = parse_activation(spelling)
    assert found is not None
    return found


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_planes(spelling: str, n: int, k: int, seed: int = 0, input_scale: float = 0.02) -> dict[str, Tensor]:
    """Valid planes of any scheme: random codes, scales around 1/50."""
    planes, draw = {}, generator(seed)
    for name, spec in Scheme.parse(spelling).planes(n, k).items():
        if name == "input_scale":
            planes[name] = torch.tensor([input_scale])
        elif spec.dtype in (torch.uint8, torch.int8):
            high = {"ternary": 3, "fp8": 120}.get(Scheme.parse(spelling).element, 256)
            plane = torch.randint(0, high, spec.shape, generator=draw, dtype=torch.int16)
            planes[name] = plane.to(torch.uint8).view(spec.dtype)
        else:
            planes[name] = (torch.rand(spec.shape, generator=draw) * 0.02 + 0.01).to(spec.dtype)
    if "ternary" in spelling:
        planes["codes"] = planes["codes"] & 0b01010101
    if "scales" in planes and planes["scales"].dtype == torch.uint8:
        planes["scales"] = (planes["scales"] % 4 + (119 if "mxfp4" in spelling else 30)).to(torch.uint8)
    return planes


def call(x: Tensor, planes: dict[str, Tensor], spelling: str, n: int, bias: Tensor | None = None) -> Tensor:
    biases = [] if bias is None else [bias]
    return torch.ops.fxquant.linear(x, list(planes.values()), biases, spelling, [n], ABI)


def seen_input(x: Tensor, scheme: Scheme, planes: dict[str, Tensor]) -> Tensor:
    """What x counts as, float64: its codes and scales, and outliers as they are."""
    activation = scheme.activation
    assert activation is not None
    codes, scales = quantize_activation(x, activation, planes.get("input_scale"))
    if activation.element == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    groups = scales.shape[-1] if not activation.static else 1
    values = codes.double().reshape(*x.shape[:-1], groups, x.shape[-1] // groups) * scales.double().unsqueeze(-1)
    values = values.reshape(x.shape)
    if activation.threshold:
        values = torch.where(outlier_features(x, activation.threshold), x.double(), values)
    return values


def assert_contract(x: Tensor, planes: dict[str, Tensor], spelling: str, n: int, bias: Tensor | None = None) -> None:
    """The bound that the op states, against float64."""
    scheme, k = Scheme.parse(spelling), x.shape[-1]
    y = call(x, planes, spelling, n, bias)
    weight, values = dequantize(planes, scheme, n, k).double(), seen_input(x, scheme, planes)
    bias = None if bias is None else bias.double()
    want = F.linear(values, weight, bias)
    magnitude = F.linear(values.abs(), weight.abs(), None if bias is None else bias.abs())
    bound = (HALF_ULP[x.dtype] + (k + 8) * 2.0**-24) * magnitude + torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    assert (y.dtype, y.shape) == (x.dtype, want.shape)
    assert ((y.double() - want).abs() <= bound).all()


# ---- codes


@pytest.mark.parametrize("spelling", ["int8", "fp8", "int8-g16", "fp8-g32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_nearest_ones_at_the_absmax_scale(spelling: str, dtype: torch.dtype) -> None:
    activation = activation_of(spelling)
    x = (torch.randn(3, 5, 64, generator=generator(0)) * 3).to(dtype)
    codes, scales = quantize_activation(x, activation)
    size, largest = activation.group or 64, LARGEST[activation.element]
    blocks = x.float().reshape(3, 5, -1, size)
    assert torch.equal(scales, blocks.abs().amax(-1) / largest)
    t = blocks / scales.unsqueeze(-1)
    if activation.element == "int8":
        want = t.double().round().to(torch.int8)  # ties to even
        assert want.abs().max() == 127
        assert torch.equal(codes, want.view(x.shape))
    else:
        patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        finite = patterns[patterns.isfinite()]
        decoded = codes.view(torch.float8_e4m3fn).float().view(t.shape)
        nearest = (t.unsqueeze(-1) - finite).abs().amin(-1)
        assert torch.equal((t - decoded).abs(), nearest)
        assert decoded.abs().max() == 448


def test_half_of_a_step_goes_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    codes, scales = quantize_activation(x, activation_of("int8"))
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("spelling", ["int8-static", "fp8-static"])
def test_static_scales_clip(spelling: str) -> None:
    activation = activation_of(spelling)
    largest = LARGEST[activation.element]
    codes, scales = quantize_activation(torch.tensor([[1e30, -5.0, 0.24, -math.inf]]), activation, torch.tensor([0.01]))
    values = dequantize_activation(codes, scales, activation)
    torch.testing.assert_close(values, torch.tensor([[1, -1, 0, -1]]) * largest * 0.01 + torch.tensor([0, 0, 0.24, 0]))


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_zeros_and_the_smallest_numbers(spelling: str) -> None:
    activation = activation_of(spelling)
    x = torch.zeros(4, 64)
    x[1], x[2, 3], x[3, 0] = 1e-45, 1e-40, 1e-30
    scale = torch.tensor([1e-3]) if activation.static else None
    codes, scales = quantize_activation(x, activation, scale)
    values = dequantize_activation(codes, scales, activation)
    assert not values[0].any()
    assert values.isfinite().all()
    assert scales.isfinite().all()
    if not (activation.static or activation.threshold):
        assert (scales >= FLOOR).all()
        torch.testing.assert_close(values[3, 0].item(), 1e-30, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spelling", ["int8", "fp8", "int8-g16", "int8-outlier6"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_does_not_get_lost(spelling: str, broken: float) -> None:
    x = torch.ones(3, 64)
    x[1, 5] = broken
    planes = random_planes(f"int8+{spelling}", 8, 64)
    y = call(x, planes, f"int8+{spelling}", 8)
    assert not y[1].isfinite().any()
    if not (spelling == "int8-outlier6" and broken == math.inf):
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_codes_are_contiguous_whatever_the_input_is(spelling: str) -> None:
    activation, scale = activation_of(spelling), torch.tensor([0.01])
    x = torch.randn(64, 6, 5).permute(2, 1, 0)
    got = quantize_activation(x, activation, scale)
    want = quantize_activation(x.contiguous(), activation, scale)
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(
    shape=st.sampled_from([(64,), (1, 64), (0, 64), (2, 0, 64), (3, 2, 128)]),
    spelling=st.sampled_from(ACTIVATIONS),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_an_input_is_within_half_a_step(shape: tuple[int, ...], spelling: str, exponent: int, seed: int) -> None:
    activation = activation_of(spelling)
    x = torch.randn(shape, generator=generator(seed)) * 10.0**exponent
    scale = (x.abs().max() if x.numel() else torch.ones(())).view(1) / LARGEST[activation.element]
    codes, scales = quantize_activation(x, activation, scale if activation.static else None)
    assert codes.shape == x.shape
    assert codes.is_contiguous()
    values = dequantize_activation(codes, scales, activation)
    if activation.threshold:
        values = torch.where(outlier_features(x, activation.threshold), x, values)
    groups = 1 if activation.static else scales.shape[-1]
    step = scales.unsqueeze(-1).expand(*x.shape[:-1], groups, x.shape[-1] // groups).reshape(x.shape)
    # e4m3: 3 bits of mantissa, the smallest distance is 2**-9. LLM.int8 rounds to float16 first.
    error = step * 0.5 if activation.element == "int8" else torch.maximum(x.abs() * 2.0**-4, step * 2.0**-10)
    half = x.abs() * 2.0**-11 + 2.0**-25 if activation.threshold else 0
    assert ((values - x).abs() <= error * (1 + 1e-5) + half).all()


# ---- products


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_keeps_the_contract(spelling: str, dtype: torch.dtype) -> None:
    n, k = 48, 256
    planes = random_planes(spelling, n, k)
    x = torch.randn(2, 5, k, generator=generator(1))
    x[0, 0, 7] = x[1, 2, 200] = 9.0  # outliers, where the scheme has them
    x[1, 1] = 0
    bias = torch.randn(n, generator=generator(2)).to(dtype)
    assert_contract(x.to(dtype), planes, spelling, n, bias)


@given(
    spelling=st.sampled_from(SCHEMES),
    n=st.integers(0, 40),
    groups=st.integers(1, 3),
    shape=st.sampled_from([(), (1,), (0,), (7,), (2, 3), (2, 0)]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 1),  # what overflows float16 is inf
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_product_on_any_shape(
    spelling: str, n: int, groups: int, shape: tuple[int, ...], dtype: torch.dtype, exponent: int, seed: int
) -> None:
    k = 64 * groups
    x = (torch.randn(*shape, k, generator=generator(seed)) * 10.0**exponent).to(dtype)
    assert_contract(x, random_planes(spelling, n, k, seed), spelling, n)


@pytest.mark.parametrize("spelling", ["int8+int8", "int8+int8-static", "llm-int8", "fp8+fp8"])
@pytest.mark.parametrize("k", [0, 1, 7, 65, 2049])
def test_any_width(spelling: str, k: int) -> None:
    assert_contract(torch.randn(4, k), random_planes(spelling, 5, k), spelling, 5)


@pytest.mark.parametrize("spelling", ["int8+int8", "int8-tensor+int8", "int8+int8-static", "llm-int8"])
@pytest.mark.parametrize("strided", [False, True])
def test_integers_equal_the_same_sum_in_integers(spelling: str, strided: bool) -> None:
    """At scales that are powers of two nothing is rounded, so nothing may differ, on either path."""
    k, n = 4096, 24
    planes = random_planes(spelling, n, k, input_scale=0.25)
    planes["scales"].fill_(2.0**-6)
    x = torch.randint(-127, 128, (k, 6), generator=generator(3)).float().t()
    x[:, 0] = 127
    x = (x if strided else x.contiguous()) * 2.0**-6
    codes, scales = quantize_activation(
        x, Scheme.parse(spelling).activation or Activation("int8"), torch.tensor([0.25])
    )
    sums = codes.long() @ planes["codes"].long().t()
    want = sums.double() * scales.double() * 2.0**-6
    got = call(x, planes, spelling, n)
    torch.testing.assert_close(got.double(), want, rtol=2.0**-23 if spelling != "llm-int8" else 1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 6, 17])
@pytest.mark.parametrize("k", [2, 7, 64])
@pytest.mark.parametrize("spelling", ["int8+int8", "llm-int8", "fp8+fp8"])
def test_codes_of_any_strides(spelling: str, k: int, rows: int) -> None:
    planes, x = random_planes(spelling, 5, k), torch.randn(rows, k)
    codes, scales = quantize_activation(x, Scheme.parse(spelling).activation or Activation("int8"))
    rest = (list(planes.values()), [], spelling, [5], ABI)
    column_major = codes.t().contiguous().t() if rows > 1 else codes.view(k, 1).t()
    got = torch.ops.fxquant.linear_on_codes(x, column_major, scales, *rest)
    assert torch.equal(got, torch.ops.fxquant.linear_on_codes(x, codes, scales, *rest))
    assert torch.equal(got, call(x, planes, spelling, 5))


@pytest.mark.parametrize("spelling", ["int8+int8", "llm-int8", "fp8+fp8"])
def test_one_row_with_the_strides_of_a_column(spelling: str) -> None:
    planes, x = random_planes(spelling, 5, 64), torch.randn(64, 1).t()
    assert x.stride() == (1, 1)
    assert torch.equal(
        call(x, planes, spelling, 5), call(x.clone(memory_format=torch.contiguous_format), planes, spelling, 5)
    )
    assert_contract(x, planes, spelling, 5)


def test_without_a_fast_integer_product_the_contract_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    took = []
    original = quantized_matmul._integer_matmul
    monkeypatch.setattr(quantized_matmul, "_integer_matmul", lambda *a: took.append(1) or original(*a))
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        for spelling in ("int8+int8", "llm-int8", "int8+int8-static"):
            x = torch.randn(3, 1000, generator=generator(4)) * 2
            assert_contract(x, random_planes(spelling, 16, 1000), spelling, 16, torch.randn(16))
    assert len(took) == 3


@pytest.mark.parametrize("spelling", ["fp8+fp8", "fp8-tensor+fp8", "fp8+fp8-static"])
def test_a_product_of_float8_keeps_the_contract(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # GPUs take this way. CPUs have torch's product as well, which is slower there than to decode both sides.
    took = []
    original = quantized_matmul._float8_matmul
    monkeypatch.setattr(quantized_matmul, "_float8_matmul", lambda *a: took.append(1) or original(*a))
    monkeypatch.setattr(quantized_matmul, "_multiplies_float8", lambda *_: True)
    planes = random_planes(spelling, 48, 1024)
    for x in (torch.randn(1, 1024), torch.randn(2, 5, 1024).bfloat16(), torch.randn(1024, 1).t(), torch.randn(0, 1024)):
        assert_contract(x, planes, spelling, 48, torch.randn(48))
    assert len(took) == 4


def test_which_products_of_float8_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    def computes(spelling: str, n: int = 64, k: int = 128) -> bool:
        found = quantized_matmul._matmul_of_codes(Scheme.parse(spelling), torch.device("cuda"), n, k)
        return found is quantized_matmul._float8_matmul

    assert computes("fp8+fp8")
    assert computes("fp8-tensor+fp8-static")
    assert not any(map(computes, ("fp8-g64+fp8", "fp8+fp8-g64", "int8+int8", "fp8e5m2+fp8", "int4+fp8")))
    assert not computes("fp8+fp8", 60)
    assert not computes("fp8+fp8", 64, 120)
    capability = (8, 6)
    assert not computes("fp8+fp8")


def test_weight_only_schemes_are_untouched() -> None:
    planes = random_planes("int8", 8, 64)
    x = torch.randn(3, 64)
    assert torch.equal(call(x, planes, "int8", 8), F.linear(x, dequantize(planes, Scheme.parse("int8"), 8, 64)))


def test_siblings_use_their_own_input_scale() -> None:
    spelling, rows = "int8+int8-static", [16, 8, 4]
    parts = [random_planes(spelling, n, 64, i, 0.01 * (i + 1)) for i, n in enumerate(rows)]
    biases = [torch.randn(16), torch.empty(0), torch.randn(4)]
    x = torch.randn(3, 64) * 3
    planes = [plane for part in parts for plane in part.values()]
    together = torch.ops.fxquant.linear(x, planes, biases, spelling, rows, ABI)
    alone = [call(x, p, spelling, n, b if b.numel() else None) for p, n, b in zip(parts, rows, biases, strict=True)]
    assert torch.equal(together, torch.cat(alone, -1))
    same = [
        call(x, {**p, "input_scale": parts[0]["input_scale"]}, spelling, n) for p, n in zip(parts, rows, strict=True)
    ]
    assert not torch.allclose(same[1], alone[1])


# ---- LLM.int8


def as_planes(layer: Any) -> dict[str, Tensor]:
    """A Linear8bitLt's own codes and scales as planes of `llm-int8`."""
    weight = layer.weight
    codes, stats = (layer.state.CB, layer.state.SCB) if layer.state.CB is not None else (weight.data, weight.SCB)
    return {"codes": codes, "scales": (stats / 127).unsqueeze(-1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("outliers", "rows"), list(itertools.product([0, 1, 5], [1, 7])))
@pytest.mark.parametrize("bias", [False, True])
def test_llm_int8_is_that_of_bitsandbytes(dtype: torch.dtype, outliers: int, rows: int, bias: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(5)
    plain = nn.Linear(192, 40, bias=bias)
    layer = bnb.nn.Linear8bitLt(192, 40, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").eval()
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(rows, 192).clamp(-5, 5)
    for i in range(outliers):
        x[i % rows, 11 * i] = (-1) ** i * (6 + 10 * i)  # the first one reaches the threshold exactly
    x = x.to(dtype)
    with torch.no_grad():
        want = layer(x)
    planes = as_planes(layer)
    got = call(x, planes, "llm-int8", 40, layer.bias.detach() if bias else None)
    scheme = Scheme.parse("llm-int8")
    assert outlier_features(x, 6.0).sum() == outliers
    codes, scales = quantize_activation(x, activation_of("int8-outlier6"))
    bnb_codes, stats, _ = bnb.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert torch.equal(codes, bnb_codes)
    assert torch.equal(scales, stats.unsqueeze(-1) / 127)
    # Two roundings to the dtype of x there (and the weights of outlier features are rounded), one here; and where
    # 127**-2 = 6.2000124e-05 is meant, bitsandbytes multiplies by 6.200124e-05.
    weight = dequantize(planes, scheme, 40, 192).double()
    magnitude = seen_input(x, scheme, planes).abs() @ weight.abs().t() + (plain.bias.double().abs() if bias else 0)
    step = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}[dtype]
    assert ((got.double() - want.double()).abs() <= (2 * step + 1.9e-5) * magnitude).all()
    if not outliers and dtype != torch.float32:
        assert (got != want).double().mean() < 0.1


@given(
    rows=st.integers(1, 6),
    threshold=st.sampled_from([6.0, 6.099, 0.5, 3.3333]),
    exponent=st.integers(-10, 6),
    special=st.sampled_from([None, math.nan, math.inf]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_llm_int8_codes_are_those_of_bitsandbytes(
    rows: int, threshold: float, exponent: int, special: float | None, seed: int
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    x = torch.randn(rows, 40, generator=generator(seed)) * 10.0**exponent
    x[rows // 2, ::7] = 0
    x[0, 3], x[-1, 4] = 6.0977, 6.1016
    if special is not None:
        x[0, 5] = special
    codes, scales = quantize_activation(x, Activation("int8", threshold=threshold))
    want, stats, columns = bnb.functional.int8_vectorwise_quant(x.half(), threshold=threshold)
    sane = stats.isfinite() & (stats > 0)  # there, bitsandbytes casts nan to int8
    assert torch.equal(codes[sane], want[sane])
    assert not codes[~sane].any()
    torch.testing.assert_close(scales.squeeze(-1), stats / 127, rtol=0, atol=0, equal_nan=True)
    assert outlier_features(x, threshold).nonzero().view(-1).tolist() == sorted(columns.tolist())


def test_outliers_are_multiplied_in_full_precision() -> None:
    planes = random_planes("llm-int8", 8, 64)
    weight = dequantize(planes, Scheme.parse("llm-int8"), 8, 64)
    x = torch.zeros(4, 64)
    x[2, 9], x[0, 9] = 1234.5678, 0.001  # feature 9 is an outlier of row 2, and so of all rows
    torch.testing.assert_close(call(x, planes, "llm-int8", 8), x @ weight.t())
    assert call(x, planes, "int8+int8-outlier2000", 8)[2, 0] != (x @ weight.t())[2, 0]


# ---- what torch has to know about the ops


def example(spelling: str, *, grad: bool = False) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    x, bias = torch.randn(3, 64, generator=generator(6)), torch.randn(16, generator=generator(7))
    return x.requires_grad_(grad), random_planes(spelling, 16, 64), bias.requires_grad_(grad)


@pytest.mark.parametrize("spelling", ["int4-g32", *SCHEMES])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 64)])
def test_gradients_are_those_of_the_dequantized_linear(spelling: str, shape: tuple[int, ...]) -> None:
    _, planes, bias = example(spelling, grad=True)
    x = torch.randn(shape, requires_grad=True)
    y = call(x, planes, spelling, 16, bias)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, bias], seed)
    weight = dequantize(planes, Scheme.parse(spelling), 16, 64)
    want = torch.autograd.grad(F.linear(x, weight, bias), [x, bias], seed)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spelling", ["int8+int8", "fp8-b32x32+fp8-g32", "int8+int8-static", "llm-int8"])
def test_opcheck(spelling: str) -> None:
    x, planes, bias = example(spelling, grad=True)
    stored = list(planes.values())
    torch.library.opcheck(torch.ops.fxquant.linear, (x, stored, [bias], spelling, [16], ABI))
    activation = str(Scheme.parse(spelling).activation)
    args = (x, activation, planes.get("input_scale"), ABI)
    op = torch.ops.fxquant.quantize_activation
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    torch.library.opcheck(op, (x.detach(), *args[1:]))
    codes, scales = (t.detach() for t in torch.ops.fxquant.quantize_activation(*args))
    on_codes = (x, codes, scales, stored, [bias], spelling, [16], ABI)
    torch.library.opcheck(torch.ops.fxquant.linear_on_codes, on_codes)


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_steps_equal_one(spelling: str, autocast: bool) -> None:
    x, planes, bias = example(spelling, grad=True)
    activation = str(Scheme.parse(spelling).activation)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one = call(x, planes, spelling, 16, bias)
        codes, scales = torch.ops.fxquant.quantize_activation(x, activation, planes.get("input_scale"), ABI)
        rest = (list(planes.values()), [bias], spelling, [16], ABI)
        two = torch.ops.fxquant.linear_on_codes(x, codes, scales, *rest)
    assert one.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(one, two)
    grads = [torch.autograd.grad(y.float().sum(), [x, bias]) for y in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


KINDS = ["int8+int8", "fp8-b32x32+fp8-g32", "fp8+fp8-static", "llm-int8", "mxfp4+fp8", "nvfp4+int8", "nf4+int8"]


@pytest.mark.parametrize("spelling", KINDS)
def test_compiled_equals_eager_forward_and_backward(spelling: str) -> None:
    x, planes, bias = example(spelling, grad=True)

    def f(x: Tensor, bias: Tensor) -> Tensor:
        return F.silu(call(x * 2, planes, spelling, 16, bias))

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(x, bias), f(x, bias))
    got, want = (torch.autograd.grad(g(x, bias).sum(), [x, bias]) for g in (compiled, f))
    torch.testing.assert_close(got, want)


def test_compiled_with_a_dynamic_batch() -> None:
    _, planes, _ = example("llm-int8")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, planes, "llm-int8", 16), fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 64) * 4
        torch.testing.assert_close(compiled(x), call(x, planes, "llm-int8", 16))


@pytest.mark.parametrize("spelling", SCHEMES)
def test_meta_gives_shapes(spelling: str) -> None:
    planes = {name: plane.to("meta") for name, plane in random_planes(spelling, 16, 64).items()}
    x = torch.empty(2, 64, device="meta", dtype=torch.bfloat16)
    y = call(x, planes, spelling, 16)
    assert (y.shape, y.dtype, y.device.type) == ((2, 16), torch.bfloat16, "meta")


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, planes, _ = example("int8+int8")
    ops, stored = torch.ops.fxquant, list(planes.values())
    with pytest.raises(SchemeError, match="'int9'"):
        ops.quantize_activation(x, "int9", None, ABI)
    with pytest.raises(ModelError, match="K=64 features does not consist of the groups of int8-g48"):
        ops.quantize_activation(x, "int8-g48", None, ABI)
    with pytest.raises(ModelError, match="int8-g48"):
        call(x, planes, "int8+int8-g48", 16)
    with pytest.raises(ModelError, match="int8 takes no input scale, got one of shape"):
        ops.quantize_activation(x, "int8", torch.ones(1), ABI)
    with pytest.raises(ModelError, match="fp8-static takes an input scale of shape"):
        ops.quantize_activation(x, "fp8-static", None, ABI)
    codes, scales = ops.quantize_activation(x, "int8", None, ABI)
    with pytest.raises(ModelError, match="not as codes"):
        ops.linear_on_codes(x, codes, scales, stored, [], "int8", [16], ABI)
    with pytest.raises(ModelError, match="expected"):
        ops.linear_on_codes(x, codes[:2], scales, stored, [], "int8+int8", [16], ABI)
    with pytest.raises(ModelError, match="expected"):
        ops.linear_on_codes(x, codes.to(torch.uint8), scales, stored, [], "int8+int8", [16], ABI)
    with pytest.raises(ModelError, match="expected"):
        ops.linear_on_codes(x, codes, scales, stored, [], "int8+int8-static", [16], ABI)


# ---- in a module


@pytest.mark.parametrize("spelling", ["int8+int8", "fp8+fp8-static", "llm-int8"])
def test_a_module_prints_its_scheme_and_comes_back(spelling: str) -> None:
    module = QLinear.replacing(nn.Linear(64, 16), Scheme.parse(spelling))
    planes = random_planes(spelling, 16, 64)
    module.load_planes(planes)
    assert f"scheme={spelling}," in repr(module)
    weight = dequantize(planes, Scheme.parse(spelling), 16, 64)
    assert torch.equal(module.weight, weight)
    back = module.restore()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, weight)
    x = torch.randn(3, 64)
    assert torch.equal(module(x), call(x, planes, spelling, 16, module.bias))
    before = {name: plane.clone() for name, plane in module.planes.items()}
    module.to(torch.bfloat16)
    assert all(torch.equal(plane, before[name]) for name, plane in module.planes.items())
    assert module(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_product_keeps_the_contract_on_cuda(spelling: str, m: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    planes = {name: plane.cuda() for name, plane in random_planes(spelling, 48, 256).items()}
    x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16) * 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x, planes, spelling, 48)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_contract(x, planes, spelling, 48)
