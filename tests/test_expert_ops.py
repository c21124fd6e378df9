"""fxquant::experts against a loop in float64: all ways of computing it, gradients, torch's own checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_planes import random_planes
from torch import Tensor

from fxquant import expert_matmul, native
from fxquant.activation_codecs import dequantize_activation, outlier_features, quantize_activation
from fxquant.codecs import dequantize, quantize
from fxquant.errors import ModelError
from fxquant.expert_matmul import PLAIN, ExpertWeights
from fxquant.expert_ops import ABI
from fxquant.native import matmul
from fxquant.plane_stacks import as_one, by_rows, dequantize_stack
from fxquant.scheme import NAMES, Scheme

SCHEMES = [
    "int8",
    "int4-g32",
    "int4-g32-asym",
    "nf4",
    "nf4-dq",
    "mxfp4",
    "fp8-tensor",
    "nvfp4",
    "q4_k",
    "int3-g64-perm",
]
COMPILED = [*SCHEMES[:-1], "int3-g32", "nf4-g32", "uint4-g32", "q6_k", "fp8"]
ACTIVATIONS = ["int8+int8", "fp8-row+fp8", "int8+int8-static", "fp8-b128x128+fp8-g128", "llm-int8"]
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-23}
"""Rounding steps; float64 inputs meet weights that are dequantized in float32."""


def stack(spelling: str, experts: int, n: int, k: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Stacked planes and the weights `[E, n, k]` that they hold."""
    scheme = Scheme.parse(spelling)
    each = [random_planes(scheme, n, k, seed * experts + e) for e in range(experts)]
    weights = [dequantize(planes, scheme, n, k) for planes in each]
    return [torch.stack([p[name] for p in each]) for name in scheme.planes(n, k)], torch.stack(weights)


def plain_stack(experts: int, n: int, k: int) -> list[Tensor]:
    return [torch.randn(experts, n, k)]


def run(x: Tensor, ids: Tensor, planes: list[Tensor], biases: list[Tensor], spelling: str, n: int) -> Tensor:
    return torch.ops.fxquant.experts(x, ids, planes, biases, spelling, n, len(planes[0]), ABI)


def seen(x: Tensor, ids: Tensor, spelling: str, planes: list[Tensor]) -> Tensor:
    """What the experts get to see of x, float64 `[T, k, K]`."""
    scheme = Scheme.parse(spelling)
    each = x.unsqueeze(1).expand(*ids.shape, x.shape[-1]) if x.dim() == 2 else x
    activation = scheme.activation
    if activation is None:
        return each.double()
    if not activation.static:
        values = dequantize_activation(*quantize_activation(x, activation), activation)
        if activation.threshold:
            values = torch.where(outlier_features(x, activation.threshold), x.float(), values)
        return (values.unsqueeze(1).expand_as(each) if x.dim() == 2 else values).double()
    scales = planes[list(scheme.planes(8, x.shape[-1])).index("input_scale")]
    rows = [
        dequantize_activation(
            *quantize_activation(row, activation, scales[max(min(e, len(scales) - 1), 0)]), activation
        )
        for row, e in zip(each.flatten(0, 1), ids.flatten().tolist(), strict=True)
    ]
    return torch.stack(rows).view(each.shape).double() if rows else each.double()


def loop(x: Tensor, ids: Tensor, weights: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one slot after the other, in float64; and the magnitudes that were added up."""
    y = torch.zeros(*ids.shape, weights.shape[1], dtype=torch.float64)
    magnitude = torch.zeros_like(y)
    for t, j in [(t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1])]:
        e = int(ids[t, j])
        if 0 <= e < len(weights):
            w, b = weights[e].double(), torch.zeros(()) if bias is None else bias[e].double()
            y[t, j], magnitude[t, j] = w @ x[t, j] + b, w.abs() @ x[t, j].abs() + b.abs()
    return y, magnitude


def assert_contract(
    y: Tensor, x: Tensor, ids: Tensor, spelling: str, planes: list[Tensor], weights: Tensor, bias: Tensor | None
) -> None:
    want, magnitude = loop(seen(x, ids, spelling, planes), ids, weights, bias)
    bound = (2 * EPSILON[x.dtype] + 2.0**-23 * (x.shape[-1] + 8)) * magnitude + 1e-30
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= bound).all()


def routed(tokens: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    """Ids of experts and, one in five or so, of none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, experts + 1, (tokens, slots), generator=generator)


@pytest.mark.parametrize("spelling", [*SCHEMES, *ACTIVATIONS])
@pytest.mark.parametrize("shared", [True, False])
def test_contract(spelling: str, shared: bool) -> None:
    k = 256 if spelling in ("q4_k",) else 128
    planes, weights = stack(spelling, 4, 128, k)
    ids, bias = routed(7, 3, 4), torch.randn(4, 128)
    x = torch.randn(7, k) * 3 if shared else torch.randn(7, 3, k) * 3
    assert_contract(run(x, ids, planes, [bias], spelling, 128), x, ids, spelling, planes, weights, bias)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 20)),
    groups=st.integers(1, 3),
    spelling=st.sampled_from(["int8", "int4-g32", "nf4", "mxfp4", "int8+int8", "int8+int8-static"]),
    dtype=st.sampled_from(list(EPSILON)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_shape_in_both_ways(
    sizes: tuple[int, int, int, int],
    groups: int,
    spelling: str,
    dtype: torch.dtype,
    flags: tuple[bool, bool, bool],
    seed: int,
) -> None:
    """By expert, as on a CPU, and in blocks, as elsewhere."""
    (tokens, slots, experts, n), k, (shared, biased, blocks) = sizes, 64 * groups, flags
    planes, weights = stack(spelling, experts, n, k, seed)
    ids = routed(tokens, slots, experts, seed)
    x = torch.randn(*((tokens, k) if shared else (tokens, slots, k)), dtype=dtype)
    bias = torch.randn(experts, n, dtype=dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr(expert_matmul, "_by_expert", expert_matmul.in_blocks)
            patch.setattr(expert_matmul, "_WEIGHTS_AT_ONCE", 3 * n * k)
        y = run(x, ids, planes, [] if bias is None else [bias], spelling, n)
    assert_contract(y, x, ids, spelling, planes, weights, bias)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled product for weights of any size; whatever is left to plain torch fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul.library() is None:
            pytest.skip("no C++ compiler")
    monkeypatch.setattr(expert_matmul, "_by_expert", None)
    with native.from_size(0):
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("spelling", COMPILED)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_product(spelling: str, shared: bool, dtype: torch.dtype) -> None:
    """With ids of no expert on both sides, and biases of other dtypes, one of them with columns apart."""
    n, k = 24, 256
    planes, weights = stack(spelling, 6, n, k)
    biases = [torch.randn(6, n), None, torch.randn(6, n, dtype=dtype), torch.randn(6, 2 * n)[:, ::2], None]
    for (tokens, slots), bias in zip([(0, 2), (1, 1), (1, 4), (5, 3), (40, 2)], biases, strict=True):
        ids = routed(tokens, slots, 6, tokens)
        x = torch.randn(*((tokens, k) if shared else (tokens, slots, k)), dtype=dtype) / 64
        y = run(x, ids, planes, [] if bias is None else [bias], spelling, n)
        assert_contract(y, x, ids, spelling, planes, weights, bias)
        assert not y[(ids < 0) | (ids >= 6)].any()


@pytest.mark.usefixtures("compiled")
def test_compiled_product_where_no_id_names_an_expert() -> None:
    planes, _ = stack("int4-g32", 3, 8, 64)
    ids = torch.tensor([[-1, 3], [3, -7], [2**40, -(2**40)]])
    assert torch.equal(run(torch.randn(3, 64), ids, planes, [torch.ones(3, 8)], "int4-g32", 8), torch.zeros(3, 2, 8))


@pytest.mark.parametrize("size", [0, 1 << 16])
def test_no_experts_at_all(size: int) -> None:
    planes = [p[:0] for p in stack("int4-g32", 1, 8, 64)[0]]
    with native.from_size(size):
        y = run(torch.randn(2, 64), torch.tensor([[0, 1], [-1, 0]]), planes, [], "int4-g32", 8)
    assert torch.equal(y, torch.zeros(2, 2, 8))


@pytest.mark.usefixtures("compiled")
def test_compiled_product_reads_no_expert_without_tokens() -> None:
    planes, weights = stack("int4-g32", 32, 16, 64)
    planes[1][[e for e in range(32) if e not in (3, 17)]] = float("nan")
    x, ids = torch.randn(3, 64), torch.tensor([[3, 17], [17, -1], [32, 3]])
    assert_contract(run(x, ids, planes, [], "int4-g32", 16), x, ids, "int4-g32", planes, weights, None)


@pytest.mark.parametrize("spelling", ["int4-g32", "int3-g64-perm"])
def test_each_expert_is_decoded_or_not_by_its_own_rows(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has more rows than the compiled product is for; the others have few, and no whole weights."""
    built = matmul.library()
    if built is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(built, "fxquant_most_rows", lambda dtype: 1024)
    planes, weights = stack(spelling, 5, 16, 64)
    ids = torch.full((2000, 1), 2)
    ids[::100, 0] = torch.arange(20) % 7 - 1
    x, bias, decoded = torch.randn(2000, 64), torch.randn(5, 16), []
    original = ExpertWeights.one

    def spied(self: ExpertWeights, e: int, dtype: torch.dtype) -> Tensor:
        decoded.append(e)
        return original(self, e, dtype)

    monkeypatch.setattr(ExpertWeights, "one", spied)
    with native.from_size(0):
        y = run(x, ids, planes, [bias], spelling, 16)
    assert decoded == [2]
    assert_contract(y, x, ids, spelling, planes, weights, bias)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("blocks", [True, False])
def test_only_hit_experts_matter_and_few_are_read(tokens: int, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that nobody wants hold nan; of two experts of 32, two are decoded, and no more than there are slots."""
    planes, weights = stack("int4-g32", 32, 16, 64)
    ids = torch.tensor([[3, 17], [17, 3]]).repeat(tokens, 1)[:tokens]
    others = [e for e in range(32) if e not in (3, 17)]
    planes[1][others] = float("nan")
    decoded: list[int] = []

    def counted(self: ExpertWeights, what: str) -> object:
        def call(*args: object) -> Tensor:
            found: Tensor = original[what](self, *args)
            decoded.append(found.numel() // (16 * 64))
            return found

        return call

    original = {what: getattr(ExpertWeights, what) for what in ("one", "of")}
    for what in original:
        monkeypatch.setattr(ExpertWeights, what, property(lambda self, what=what: counted(self, what)))
    if blocks:
        monkeypatch.setattr(expert_matmul, "_by_expert", expert_matmul.in_blocks)
    x = torch.randn(tokens, 64)
    y = run(x, ids, planes, [], "int4-g32", 16)
    want, _ = loop(x.unsqueeze(1).expand(tokens, 2, 64).double(), ids, weights, None)
    assert torch.allclose(y.double(), want, rtol=1e-4, atol=1e-3)
    assert sum(decoded) == (2 if not blocks else min(2 * tokens, 2 * tokens // 4 + 32 if tokens > 16 else 99))


@pytest.mark.parametrize("tokens", [3, 40])
def test_blocks_that_nobody_needs_read_an_expert_that_is_hit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()
    original = ExpertWeights.of

    def spied(self: ExpertWeights, ids: Tensor, dtype: torch.dtype) -> Tensor:
        asked.update(ids.tolist())
        return original(self, ids, dtype)

    monkeypatch.setattr(ExpertWeights, "of", spied)
    planes, _ = stack("int4-g32", 32, 16, 64)
    weights = ExpertWeights(dict(zip(("codes", "scales"), planes, strict=True)), Scheme.parse("int4-g32"), 16, 64, 32)
    ids = torch.tensor([[5, -1], [9, 32]]).repeat(tokens, 1)
    expert_matmul.in_blocks(torch.randn(2 * tokens, 64), ids, weights, None)
    assert asked == {5, 9}


@pytest.mark.parametrize("spelling", ["int8", "int4-g32", "nf4-dq", "int8+int8", PLAIN])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_gradients(spelling: str, shared: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr(expert_matmul, "_by_expert", expert_matmul.in_blocks)
    planes = stack(spelling, 5, 12, 64)[0] if spelling else plain_stack(5, 12, 64)
    weights = stack(spelling, 5, 12, 64)[1].double() if spelling else planes[0].double()
    ids, tokens = routed(9, 3, 5), (9, 64) if shared else (9, 3, 64)
    x, bias, grad = (
        torch.randn(tokens, requires_grad=True),
        torch.randn(5, 12, requires_grad=True),
        torch.randn(9, 3, 12),
    )
    if not spelling:
        planes[0].requires_grad_()
    run(x, ids, planes, [bias], spelling, 12).backward(grad)
    x64, b64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    w64, present = weights.detach().requires_grad_(), ((ids >= 0) & (ids < 5)).unsqueeze(-1)
    chosen = ids.clamp(0, 4)
    each = x64.unsqueeze(1).expand(9, 3, 64) if shared else x64
    y = (torch.einsum("tjk,tjnk->tjn", each, w64[chosen]) + b64[chosen]) * present
    y.backward(grad.double())
    pairs = [(x.grad, x64.grad), (bias.grad, b64.grad), *([] if spelling else [(planes[0].grad, w64.grad)])]
    for got, want in pairs:
        assert got is not None
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


def test_weight_gradient_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device is no CPU either, but computes nothing: the blocks are called for themselves."""
    grad, x, ids = torch.randn(9, 3, 4), torch.randn(9, 5), routed(9, 3, 4)
    want = expert_matmul.weight_gradient(grad, x, ids, 4)
    monkeypatch.setattr(expert_matmul, "_WEIGHTS_AT_ONCE", 50)
    assert torch.allclose(expert_matmul.weight_gradient_in_blocks(grad, x, ids, 4), want, atol=1e-5)
    empty = expert_matmul.weight_gradient_in_blocks(grad[:0], x[:0], ids[:0], 4)
    assert torch.equal(empty, torch.zeros(4, 4, 5))


@pytest.mark.parametrize("spelling", ["int4-g32", "int8+int8", PLAIN])
@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(spelling: str, shared: bool) -> None:
    planes = stack(spelling, 4, 8, 64)[0] if spelling else plain_stack(4, 8, 64)
    planes = [p.requires_grad_() if not spelling else p for p in planes]
    x = torch.randn(*((3, 64) if shared else (3, 2, 64)), requires_grad=True)
    bias = torch.randn(4, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.fxquant.experts, (x, routed(3, 2, 4), planes, [bias], spelling, 8, 4, ABI))


@pytest.mark.parametrize("spelling", ["int4-g32", PLAIN])
def test_compiles_to_one_graph_with_gradients_and_any_number_of_tokens(spelling: str) -> None:
    planes = stack(spelling, 4, 8, 64)[0] if spelling else [plain_stack(4, 8, 64)[0].requires_grad_()]

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, ids: Tensor) -> Tensor:
        return run(x, ids, planes, [], spelling, 8).square().sum()

    for tokens in (2, 5, 9):
        x, ids = torch.randn(tokens, 64, requires_grad=True), routed(tokens, 2, 4)
        compiled(x, ids).backward()
        found, planes[0].grad = planes[0].grad, None
        other = x.detach().clone().requires_grad_()
        run(other, ids, planes, [], spelling, 8).square().sum().backward()
        assert x.grad is not None
        assert other.grad is not None
        assert torch.allclose(x.grad, other.grad)
        assert (planes[0].grad is None) is bool(spelling)
        if planes[0].grad is not None:
            assert found is not None
            assert torch.allclose(found, planes[0].grad)
            planes[0].grad = None


def test_autocast_lowers_x_alone() -> None:
    planes, weights = stack("nf4", 4, 16, 64)
    x, ids = torch.randn(5, 64), routed(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, ids, planes, [], "nf4", 16)
    assert_contract(y, x.bfloat16(), ids, "nf4", planes, weights, None)


def test_meta_gives_shapes() -> None:
    planes = [p.to("meta") for p in stack("int4-g32", 4, 16, 64)[0]]
    y = run(
        torch.empty(5, 64, device="meta"),
        torch.zeros(5, 2, dtype=torch.int64, device="meta"),
        planes,
        [],
        "int4-g32",
        16,
    )
    assert (y.shape, y.device.type) == ((5, 2, 16), "meta")


def test_what_does_not_fit_is_refused() -> None:
    planes, ids = stack("int4-g32", 4, 16, 64)[0], torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ModelError, match="K=32"):
        run(torch.randn(2, 32), ids, planes, [], "int4-g32", 16)
    with pytest.raises(ModelError, match="N=8"):
        run(torch.randn(2, 64), ids, planes, [], "int4-g32", 8)
    with pytest.raises(ModelError, match="int32 ids"):
        run(torch.randn(2, 64), ids.int(), planes, [], "int4-g32", 16)
    with pytest.raises(ModelError, match="x \\[3, 64\\]"):
        run(torch.randn(3, 64), ids, planes, [], "int4-g32", 16)
    with pytest.raises(ModelError, match=r"one bias for all experts, \[4, 16\]"):
        run(torch.randn(2, 64), ids, planes, [torch.randn(16)], "int4-g32", 16)


@pytest.mark.parametrize("spelling", sorted(NAMES))
@pytest.mark.parametrize(("n", "k"), [(16, 256), (128, 256), (3, 512)])
def test_a_stack_decodes_as_its_weights_do(spelling: str, n: int, k: int) -> None:
    scheme = Scheme.parse(spelling)
    if scheme.misfit(n, k):
        pytest.skip("no such weight")
    planes, weights = stack(spelling, 3, n, k)
    named = dict(zip(scheme.planes(n, k), planes, strict=True))
    assert torch.equal(dequantize_stack(named, scheme, n, k, torch.float32), weights)


@pytest.mark.parametrize(
    "spelling", ["int4-g32", "int8", "int8-tensor", "fp8-tensor", "mxfp4", "nvfp4", "nf4", "q4_k", "fp8-b16x32"]
)
def test_the_common_schemes_are_decoded_at_once(spelling: str) -> None:
    assert as_one(Scheme.parse(spelling), 16, 256, 3) is not None


@pytest.mark.parametrize(
    ("spelling", "k", "answer"), [("int4-g32", 64, True), ("nf4", 128, True), ("nf4", 96, False), ("int8", 7, True)]
)
def test_rows_of_planes_are_planes_of_rows(spelling: str, k: int, answer: bool) -> None:
    scheme = Scheme.parse(spelling)
    assert by_rows(scheme, 6, k) is answer
    if answer:
        weight = torch.randn(6, k)
        top, bottom = (quantize(part, scheme) for part in (weight[:2], weight[2:]))
        whole = quantize(weight, scheme)
        for name, plane in whole.items():
            assert torch.equal(torch.cat((top[name], bottom[name])), plane)


@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 4, 16]), st.integers(0, 2**31))
def test_every_slot_of_an_expert_has_a_row_of_its_own_in_a_block_of_that_expert(
    tokens: int, slots: int, experts: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, slots), generator=generator)
    owners, sources, places = torch.ops.fxquant.expert_blocks(ids, experts, size, ABI)
    count = ids.numel() // size + experts
    assert (len(owners), len(sources), len(places)) == (count, count * size, ids.numel())
    present = (ids >= 0) & (ids < experts)
    rows = places[present.view(-1)]
    assert rows.unique().numel() == rows.numel()
    assert torch.equal(owners[rows // size], ids[present])
    assert torch.equal(sources[rows], torch.arange(ids.numel())[present.view(-1)])
    # No more blocks are somebody's than the slots of each expert fill.
    assert int((owners >= 0).sum()) == sum(-(-int((ids == e).sum()) // size) for e in range(experts))


def test_blocks_of_ids_in_columns() -> None:
    ids = routed(3, 40, 5).t()
    found = torch.ops.fxquant.expert_blocks(ids, 5, 16, ABI)
    for one, other in zip(found, torch.ops.fxquant.expert_blocks(ids.contiguous(), 5, 16, ABI), strict=True):
        assert torch.equal(one, other)


def test_opcheck_of_blocks() -> None:
    torch.library.opcheck(torch.ops.fxquant.expert_blocks, (routed(9, 3, 5), 5, 4, ABI))
