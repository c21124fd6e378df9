"""fxquant::gated_experts against float64, in all ways of computing it, and where QExperts uses it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_planes import random_planes
from torch import Tensor

from fxquant import native
from fxquant.codecs import dequantize
from fxquant.errors import ModelError
from fxquant.expert_modules import QExperts
from fxquant.expert_ops import ABI
from fxquant.native import matmul
from fxquant.scheme import Scheme

PAIRS = [
    ("int4-g128", "int4-g128"), ("int4-g32", "int8"), ("int4-row", "nf4-g32"), ("mxfp4", "int4-g16"), ("q4_k", "q6_k"),
    ("nf4-dq", "uint4-g32-bias"), ("int4-g256", "int4-g64-asym"), ("fp8", "int3-g32"), ("nvfp4", "iq4-g32"),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = 4


def planes_of(spelling: str, n: int, k: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Stacked planes, scaled so that sums are around 1 or less, and the weights that they hold."""
    scheme = Scheme.parse(spelling)
    each = [random_planes(scheme, n, k, seed + e) for e in range(EXPERTS)]
    with native.from_size(float("inf")):
        weights = torch.stack([dequantize(planes, scheme, n, k).double() for planes in each])
    return [torch.stack([p[name] for p in each]) for name in scheme.planes(n, k)], weights


def routed(tokens: int, picks: int) -> tuple[Tensor, Tensor]:
    """Ids of experts and, one in three, of none; and their weights, which are not contiguous."""
    ids = torch.randint(-1, EXPERTS + 1, (picks, tokens)).t()
    return ids, torch.rand(picks, tokens).t() / picks


def exact(x: Tensor, ids: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, j in [(t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1])]:
        e = int(ids[t, j])
        if 0 <= e < EXPERTS:
            gate, up = (first[e] @ x[t].double()).chunk(2)
            y[t] += weights[t, j].double() * (second[e] @ (torch.nn.functional.silu(gate) * up))
    return y


def check(y: Tensor, want: Tensor, eps: float) -> None:
    assert y.isfinite().all()
    assert (y.double() - want).norm() <= 4 * eps * want.norm() + 1e-6


@pytest.fixture
def compiled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul.library() is None:
            pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_native_layer(pair: tuple[str, str], data: st.DataObject) -> None:
    tokens, picks = data.draw(st.sampled_from((1, 2, 7, 20)), "tokens"), data.draw(st.integers(1, 5), "picks")
    dtype, threads = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from((1, 2)), "threads")
    parsed = [Scheme.parse(spelling) for spelling in pair]
    k = inner = 256
    if all(scheme.block.columns in (0, 16, 32) for scheme in parsed):
        k, inner = 32 * data.draw(st.integers(1, 9), "k"), 32 * data.draw(st.integers(1, 9), "inner")
    (first, w1), (second, w2) = planes_of(pair[0], 2 * inner, k, 1), planes_of(pair[1], k, inner, 9)
    x = (torch.randn(tokens, 2 * k)[:, ::2] / w1.std() / k**0.5).to(dtype)
    ids, weights = routed(tokens, picks)
    weights = (weights / w2.std() / inner**0.5).to(data.draw(st.sampled_from(DTYPES), "dtype of weights"))
    named = [
        dict(zip(s.planes(8, 256), planes, strict=True)) for s, planes in zip(parsed, (first, second), strict=True)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native.from_size(0):
            y = native.gated_experts(x, ids, weights, (named[0], parsed[0]), (named[1], parsed[1]), inner, EXPERTS)
    finally:
        torch.set_num_threads(before)
    assert y is not None, "not covered"
    assert (y.dtype, y.shape) == (dtype, x.shape)
    check(y, exact(x, ids, weights, w1, w2), torch.finfo(dtype).eps)


@pytest.mark.usefixtures("compiled")
def test_silu_far_out() -> None:
    """Where its exponential overflows, or is 0; and what is not a number."""
    scheme, k = Scheme.parse("int4-row"), 16
    gate = torch.tensor([-200.0, -104.0, -89.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 17.0, 89.0, 1e3, torch.nan])
    codes = torch.full((1, 2 * k, k // 2), 0x99, dtype=torch.uint8)  # code 1
    codes[:, :k] = 0x88  # 0
    codes[:, : len(gate), 0] = 0x89
    first = {"codes": codes, "scales": torch.ones(1, 2 * k, 1, dtype=scheme.planes(2 * k, k)["scales"].dtype)}
    second = {"codes": torch.full((1, k, k // 2), 0x88, dtype=torch.uint8), "scales": first["scales"][:, :k].clone()}
    for i, value in enumerate(gate.tolist()):
        second["codes"].fill_(0x88)
        second["codes"][0, 0, i // 2] = 0x98 if i % 2 else 0x89
        x = torch.zeros(1, k)
        x[0, 0] = value
        with native.from_size(0):
            y = native.gated_experts(
                x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), (first, scheme), (second, scheme), k, 1
            )
        assert y is not None
        want = torch.nn.functional.silu(torch.tensor(value)) * value
        torch.testing.assert_close(y[0, 0], want, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("compiled")
def test_what_the_native_layer_leaves() -> None:
    scheme = Scheme.parse("int4-g32")
    named = [dict(zip(scheme.planes(64, 64), planes_of("int4-g32", n, 64, 0)[0], strict=True)) for n in (128, 64)]
    x, (ids, weights) = torch.randn(2, 64), routed(2, 2)

    def run(x: Tensor, ids: Tensor, weights: Tensor, first: dict[str, Tensor] = named[0]) -> Tensor | None:
        with native.from_size(0):
            return native.gated_experts(x, ids, weights, (first, scheme), (named[1], scheme), 64, EXPERTS)

    assert run(x, ids, weights) is not None
    assert run(x.double(), ids, weights) is None
    assert run(x, ids.int(), weights) is None
    assert run(x, ids, weights.double()) is None
    assert run(x, ids, weights[:1]) is None
    assert run(x.unsqueeze(1).expand(2, 2, 64), ids, weights) is None
    assert run(x[:0], ids[:0], weights[:0]) is None
    assert run(x, ids, weights, {**named[0], "codes": named[0]["codes"][:, :64]}) is None
    ids = (torch.arange(600) % EXPERTS).view(300, 2)
    assert run(torch.randn(300, 64), ids, torch.rand(300, 2)) is None, "many ids"


def arguments(dtype: torch.dtype = torch.float32) -> tuple[tuple[object, ...], Tensor]:
    """Of the op, and what it should give."""
    (first, w1), (second, w2) = planes_of("int4-g32", 128, 64, 0), planes_of("nf4-g32", 64, 64, 5)
    x, (ids, weights) = (torch.randn(3, 64) / 16).to(dtype), routed(3, 2)
    want = exact(x, ids, weights, w1, w2)
    return (x, ids, weights, first, second, "int4-g32", "nf4-g32", 64, EXPERTS, ABI), want


@pytest.mark.parametrize("smallest", [0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_op(dtype: torch.dtype, smallest: float) -> None:
    given_, want = arguments(dtype)
    with native.from_size(smallest):
        y = torch.ops.fxquant.gated_experts(*given_)
    assert y.dtype == dtype
    check(y, want, max(torch.finfo(dtype).eps, 2.0**-20))


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fxquant.gated_experts, arguments()[0], test_utils=tests)


def test_autocast_lowers_x_alone() -> None:
    given_, want = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.fxquant.gated_experts(*given_)
    assert y.dtype == torch.bfloat16
    check(y, want, 2.0**-7)


def test_a_gradient_is_refused() -> None:
    (x, *rest), _ = arguments()
    assert isinstance(x, Tensor)
    with pytest.raises(ModelError, match="no gradient"):
        torch.ops.fxquant.gated_experts(x.requires_grad_(), *rest)
    with torch.no_grad():
        torch.ops.fxquant.gated_experts(x, *rest)


def test_what_does_not_fit_is_refused() -> None:
    (x, ids, weights, first, second, *rest), _ = arguments()
    run: Callable[..., Tensor] = torch.ops.fxquant.gated_experts
    assert isinstance(weights, Tensor)
    assert isinstance(first, list)
    with pytest.raises(ModelError, match=r"weights \[T, k\]"):
        run(x, ids, weights[:2], first, second, *rest)
    with pytest.raises(ModelError, match="not int4-g32 of 4 experts"):
        run(x, ids, weights, first[::-1], second, *rest)
    with pytest.raises(ModelError, match="not nf4-g32 of 4 experts"):
        run(x, ids, weights, first, first, *rest)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> tuple[QExperts, tuple[Tensor, ...], list[int]]:
    """Experts, arguments for them, and how many slots the op saw in each call."""
    pytest.importorskip("transformers")
    from expert_classes import arguments as arguments_of
    from expert_classes import experts_module, read

    from fxquant.codecs import quantize
    from fxquant.experts import expert_weight

    module = experts_module("Qwen3MoeExperts")
    layout, scheme, calls = read(module), Scheme.parse("int4-g32"), []
    keys = [(e, p.name) for e in range(layout.experts) for p in layout.projections]
    experts = QExperts(module, layout, dict.fromkeys(keys, scheme))
    for e, name in keys:
        experts.load_planes(name, e, quantize(expert_weight(module, layout, name, e).detach(), scheme, "absmax"))

    def seen(x: Tensor, ids: Tensor, *rest: object) -> None:
        calls.append(ids.numel())

    monkeypatch.setattr(native, "gated_experts", seen)
    return experts, arguments_of(module, 9), calls


def test_experts_use_it_where_no_gradient_is_wanted(layer: tuple[QExperts, tuple[Tensor, ...], list[int]]) -> None:
    experts, given_, calls = layer
    want = experts(*given_)
    assert not calls, "a gradient may be wanted"
    for run in (experts, copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        with torch.no_grad():
            torch.testing.assert_close(run(*given_), want)
        assert calls == [given_[1].numel()]
        calls.clear()


def test_experts_use_it_compiled_and_not_for_other_activations(
    layer: tuple[QExperts, tuple[Tensor, ...], list[int]],
) -> None:
    experts, given_, calls = layer
    with torch.no_grad():
        want = experts(*given_)
        calls.clear()
        y = torch.compile(experts, fullgraph=True, backend="aot_eager")(*given_)
        assert calls == [given_[1].numel()]
        torch.testing.assert_close(y, want)
        calls.clear()
        torch.compiler.reset()
        experts.act_fn = torch.nn.GELU()
        assert not torch.equal(experts(*given_), want)
        assert not calls


def test_one_graph_serves_any_number_of_tokens(layer: tuple[QExperts, tuple[Tensor, ...], list[int]]) -> None:
    experts, (x, ids, weights), calls = layer
    run = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        want = run(x, ids, weights)
        y = run(*(t.repeat(300, 1) for t in (x, ids, weights)))
        torch.testing.assert_close(y[: len(x)], want)
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        shapes = tuple({0: tokens} for _ in range(3))
        exported = torch.export.export(experts, (x, ids, weights), dynamic_shapes=(shapes,))
        torch.testing.assert_close(exported.module()(x, ids, weights), want)
    assert len(calls) == 3


def test_autocast_gives_back_the_dtype_of_x(layer: tuple[QExperts, tuple[Tensor, ...], list[int]]) -> None:
    experts, given_, calls = layer
    with torch.no_grad():
        want = experts(*given_)
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(*given_)
    assert len(calls) == 2
    assert y.dtype == want.dtype
    check(y, want.double(), 2.0**-7)
