"""QExperts against each class's own forward on the dequantized weights; and in a model's life."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_classes import arguments, experts_classes, experts_module, read
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.activation_codecs import dequantize_activation, quantize_activation
from fxquant.codecs import dequantize, quantize
from fxquant.errors import ModelError, SchemeError
from fxquant.expert_modules import QExperts
from fxquant.experts import expert_bias, expert_weight
from fxquant.scheme import Activation, Scheme

pytest.importorskip("transformers")
SCHEMES = ["int8", "int4-g32", "nf4", "mxfp4"]
Choice = Callable[[int, str], str | None]


def quantized(module: nn.Module, choose: Choice) -> tuple[QExperts, nn.Module]:
    """QExperts in the place of a module, and the module with the weights that these hold."""
    layout, reference = read(module), copy.deepcopy(module)
    matrices = [(e, p.name) for e in range(layout.experts) for p in layout.projections]
    spelled = {key: choose(*key) for key in matrices}
    schemes = {key: Scheme.parse(spelling) if spelling else None for key, spelling in spelled.items()}
    new = QExperts(module, layout, schemes)
    for e, name in matrices:
        weight, scheme = expert_weight(module, layout, name, e).detach(), schemes[e, name]
        if scheme is None:
            new.load_planes(name, e, {"weight": weight})
            continue
        planes = quantize(weight, scheme, "absmax")
        new.load_planes(name, e, planes)
        with torch.no_grad():
            expert_weight(reference, layout, name, e).copy_(dequantize(planes, scheme, *weight.shape, weight.dtype))
    return new, reference


def always(spelling: str | None) -> Choice:
    return lambda e, name: spelling


def mixed(e: int, name: str) -> str | None:
    """Gate and up alike and not, experts alike and not, some as they are."""
    if name == "gate_proj":
        return ["int8", "int4-g32", None, "nf4"][e % 4]
    return ["int8", "nf4", None, "nf4"][e % 4] if name == "up_proj" else [None, "int8", "int4-g32", "int8"][e % 4]


def assert_close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert (got.float() - want.float()).abs().max() <= tolerance * max(want.abs().max().item(), 1e-3)


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_class(name: str, spelling: str) -> None:
    module = experts_module(name)
    new, reference = quantized(module, always(spelling))
    args = arguments(module)
    assert_close(new(*args), reference(*args))


@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_class_with_mixed_schemes(name: str) -> None:
    module = experts_module(name)
    new, reference = quantized(module, mixed)
    args = arguments(module)
    assert_close(new(*args), reference(*args))
    found = list(new.matrices())
    for e, projection, scheme in found:
        assert (None if scheme is None else str(scheme)) == mixed(e, projection.name)
    assert len({(e, projection.name) for e, projection, _ in found}) == new.layout.experts * len(new.layout.projections)


@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_class_in_bfloat16(name: str) -> None:
    """As far from float32 as the class's own forward is: a few roundings."""
    module = experts_module(name, torch.bfloat16)
    new, reference = quantized(module, always("int8"))
    args = arguments(module, dtype=torch.bfloat16)
    got, own = new(*args), reference(*args)
    exact = reference.float()(*[a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args])
    assert got.dtype == torch.bfloat16
    floor = 2.0**-8 * exact.abs().max()
    assert (got.float() - exact).abs().max() <= 1.5 * (own.float() - exact).abs().max() + floor


@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_class_comes_back(name: str) -> None:
    """Own class, same names in the same order, and the weights that were stored, bit by bit."""
    module = experts_module(name)
    if name == "LongcatFlashExperts":
        with torch.no_grad():
            module.gate_up_proj[4:] = 0  # belongs to experts that do nothing
    before = copy.deepcopy(module.state_dict())
    new, reference = quantized(module, mixed)
    assert new.state_dict().keys() != before.keys()
    back = new.restore()
    assert type(back) is type(module)
    assert_same(back.state_dict(), reference.state_dict())
    assert_same(module.state_dict(), before)
    assert vars(back).keys() == vars(module).keys()
    assert list(dict(back.named_children())) == list(dict(module.named_children()))
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }
    args = arguments(module)
    assert torch.equal(back(*args), reference(*args))


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


class RoundedInputs(TorchFunctionMode):
    """Every product of a two- or three-dimensional weight has an input that is rounded as the activation says."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm):
            x = args[0]
            args = (dequantize_activation(*quantize_activation(x, self.activation), self.activation), *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_every_class_with_quantized_activations(name: str) -> None:
    """Where two numbers differ by a rounding, a code may fall to the other side: hence the tolerance."""
    module = experts_module(name)
    new, reference = quantized(module, always("int8+int8"))
    args = arguments(module)
    activation = Scheme.parse("int8+int8").activation
    assert activation is not None
    with RoundedInputs(activation):
        want = reference(*args)
    error = (new(*args) - want).square().mean() / want.square().mean()
    distance = (reference(*args) - want).square().mean() / want.square().mean()
    assert error <= 1e-6 + distance / 20


CONVENTIONAL = ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts", "AriaExperts"]


@pytest.mark.parametrize("name", CONVENTIONAL)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(name: str, tokens: int) -> None:
    module = experts_module(name)
    new, reference = quantized(module, mixed)
    args = arguments(module, tokens)
    y = new(*args)
    assert y.shape == args[0].shape
    if tokens:
        assert_close(y, reference(*args))


@pytest.mark.parametrize("name", CONVENTIONAL)
@pytest.mark.parametrize("choose", [always("int8"), mixed])
def test_ids_that_name_no_expert_add_nothing(name: str, choose: Choice) -> None:
    """Whatever the router's weight for them is, as expert parallelism has it."""
    module = experts_module(name)
    new, reference = quantized(module, choose)
    x, ids, weights = arguments(module)
    want = reference(x, ids, weights.index_put((torch.arange(9), torch.zeros(9, dtype=torch.long)), torch.tensor(0.0)))
    for absent in (-1, 4, 2**40):
        some = ids.clone()
        some[:, 0] = absent
        wild = weights.clone()
        wild[:, 0] = float("nan")
        assert_close(new(x, some, wild), want)


def test_a_norm_that_makes_something_of_nothing_is_not_asked_for_it() -> None:
    module = experts_module("MuseSparkExperts")
    module.post_expert_norm = nn.RMSNorm(64, eps=0.0)
    new, reference = quantized(module, always("int8"))
    x, ids, weights = arguments(module)
    want = reference(x, ids, weights)
    absent = torch.cat((ids, torch.full((9, 1), -1)), 1)
    assert_close(new(x, absent, torch.cat((weights, torch.ones(9, 1)), 1)), want)


def test_a_class_that_computes_in_float32_does() -> None:
    """OpenAI's privacy filter: one rounding at the end, however bfloat16 its input is."""
    module = experts_module("OpenAIPrivacyFilterExperts")
    new, reference = quantized(module, always("int8"))
    args = arguments(module, dtype=torch.bfloat16)
    off = (new(*args).double() - reference(*args).double()).abs() > 0
    assert off.double().mean() < 0.02


def test_rows_that_no_expert_owns_are_never_read() -> None:
    module = experts_module("LongcatFlashExperts")
    new, reference = quantized(module, lambda e, name: "int8" if name == "down_proj" else None)
    args = arguments(module)
    assert_close(new(*args), reference(*args))


def test_keywords_are_those_of_the_class() -> None:
    module = experts_module("GptOssExperts")
    new, reference = quantized(module, always("int8"))
    x, ids, weights = arguments(module)
    assert_close(new(x, routing_weights=weights, router_indices=ids), reference(x, ids, weights))
    with pytest.raises(TypeError, match="GptOssExperts takes hidden_states, router_indices, routing_weights"):
        new(x, ids, top_k_weights=weights)


def test_what_the_config_says_about_implementations_has_no_effect() -> None:
    module = experts_module("MixtralExperts")
    new, _ = quantized(module, always("int8"))
    args = arguments(module)
    want = new(*args)
    for implementation in ("grouped_mm", "batched_mm", "eager", "no such thing"):
        module.config._experts_implementation = implementation
        assert torch.equal(new(*args), want)


def test_gate_and_up_of_one_scheme_are_one_stack() -> None:
    for name, choose, count in [
        ("MixtralExperts", always("int4-g32"), 2),
        ("GptOssExperts", always("nf4"), 2),  # flat blocks of whole rows
        ("MixtralExperts", always("int8-tensor"), 3),  # one scale for a whole matrix
        ("DbrxExperts", always("int8"), 3),
        ("NemotronHExperts", always("int8"), 2),
        ("MixtralExperts", lambda e, name: "int8" if e % 2 else "int4-g32", 4),
    ]:
        new, _ = quantized(experts_module(name), choose)
        assert len(new.stacks) == count, new.stacks
    assert [s.name for s in new.stacks] == ["gate_up_proj_0", "gate_up_proj_1", "down_proj_0", "down_proj_1"]


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "DbrxExperts"])
@pytest.mark.parametrize("choose", [always("int8"), mixed])
def test_projections_one_by_one(name: str, choose: Choice) -> None:
    """What an adapter of one's own asks for: each by its own name."""
    module = experts_module(name)
    new, reference = quantized(module, choose)
    x, ids, _ = arguments(module)
    x = x.view(9, 64)
    for projection in ("gate_proj", "up_proj"):
        want = torch.stack([expert_weight(reference, new.layout, projection, e) @ x.T for e in range(4)])
        bias = [expert_bias(reference, new.layout, projection, e) for e in range(4)]
        want = torch.stack([w if b is None else w + b.unsqueeze(-1) for w, b in zip(want, bias, strict=True)])
        chosen = want[ids, :, torch.arange(9).unsqueeze(-1)]
        assert_close(new.project(projection, x, ids), chosen)


def test_state_dict_holds_plain_tensors_under_plain_names() -> None:
    new, _ = quantized(experts_module("GptOssExperts"), lambda e, name: "int4-g32" if name != "down_proj" else None)
    state = new.state_dict()
    assert set(state) == {
        "gate_up_proj_codes",
        "gate_up_proj_scales",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    }
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    other = QExperts(
        experts_module("GptOssExperts", seed=1),
        new.layout,
        {
            (e, name): scheme
            for e in range(4)
            for name in ("gate_proj", "up_proj")
            if (scheme := new.scheme_of(name, e))
        },
    )
    other.load_state_dict(state, assign=True)
    args = arguments(experts_module("GptOssExperts"))
    assert torch.equal(new(*args), other(*args))


def test_what_is_not_quantized_is_the_modules_own() -> None:
    module = experts_module("GptOssExperts")
    new, _ = quantized(module, lambda e, name: "int8" if name == "down_proj" else None)
    assert new.gate_up_proj is module.gate_up_proj
    assert new.down_proj_bias is module.down_proj_bias
    assert new.restore().gate_up_proj is module.gate_up_proj


def test_planes_come_back_as_they_were_loaded() -> None:
    for name in ("MixtralExperts", "GptOssExperts", "DbrxExperts"):
        module = experts_module(name)
        new, reference = quantized(module, always("nf4"))
        for e, projection in ((0, "gate_proj"), (3, "up_proj"), (2, "down_proj")):
            weight = expert_weight(module, new.layout, projection, e).detach()
            want = quantize(weight, Scheme.parse("nf4"), "absmax")
            assert_same(new.planes_of(projection, e), want)
            assert torch.equal(new.weight_of(projection, e), expert_weight(reference, new.layout, projection, e))


def test_what_does_not_fit_is_refused() -> None:
    module = experts_module("MixtralExperts")
    new, _ = quantized(module, always("int4-g32"))
    planes = new.planes_of("down_proj", 0)
    with pytest.raises(ModelError, match=r"no matrix 4\.down_proj\n  experts: 0 to 3"):
        new.load_planes("down_proj", 4, planes)
    with pytest.raises(ModelError, match=r"0\.gate_proj: these are not planes of int4-g32"):
        new.load_planes("gate_proj", 0, planes)
    with pytest.raises(ModelError, match=r"do not have: \[\(7, 'down_proj'\)\]"):
        QExperts(module, new.layout, {(7, "down_proj"): Scheme.parse("int8")})
    with pytest.raises(SchemeError, match=r"int4 cannot hold 0.gate_proj, \[128, 64\]: K=64 is not a multiple"):
        QExperts(module, new.layout, {(0, "gate_proj"): Scheme.parse("int4-g128")})


def test_devices_and_dtypes() -> None:
    new, reference = quantized(experts_module("GptOssExperts"), mixed)
    planes = {s.tensor(n): getattr(new, s.tensor(n)).dtype for s in new.stacks if s.scheme for n in s.planes}
    args = arguments(reference, dtype=torch.bfloat16)
    new.to(torch.bfloat16)
    assert {name: getattr(new, name).dtype for name in planes} == planes
    assert new.weight_of("down_proj", 1).dtype == new.gate_up_proj_bias.dtype == torch.bfloat16
    assert new.restore().gate_up_proj.dtype == torch.bfloat16
    assert_close(new(*args).float(), reference(*[a.float() if a.is_floating_point() else a for a in args]), 0.05)
    assert new.to("meta")(*[a.to("meta") for a in args]).shape == (9, 64)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied: Callable[[QExperts], QExperts]) -> None:
    module = experts_module("MixtralExperts")
    module.config = None
    new, _ = quantized(module, mixed)
    args = arguments(module)
    assert torch.equal(copied(new)(*args), new(*args))


def test_hooks_attributes_and_training_flag_are_kept() -> None:
    module = experts_module("MuseSparkExperts").eval()
    calls: list[str] = []
    handle = module.register_forward_hook(lambda *_: calls.append("called"))
    module.note = "kept"
    new, _ = quantized(module, always("int8"))
    new(*arguments(module))
    handle.remove()
    new(*arguments(module))
    assert calls == ["called"]
    assert (new.note, new.training, new.num_experts) == ("kept", False, 4)
    assert new.post_expert_norm is module.post_expert_norm
    assert "MuseSparkExperts, experts=4, 4 x gate_up_proj [256, 64] int8" in repr(new)


@pytest.mark.parametrize(
    "name", ["MixtralExperts", "GptOssExperts", "Llama4TextExperts", "DbrxExperts", "LongcatFlashExperts"]
)
def test_gradients_are_those_of_the_class(name: str) -> None:
    module = experts_module(name)
    new, reference = quantized(module, mixed)
    results = []
    for each in (new, reference):
        x, *rest = arguments(module)
        x.requires_grad_()
        rest = [r.requires_grad_() if isinstance(r, Tensor) and r.is_floating_point() else r for r in rest]
        y = each(x, *rest)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        results.append([t.grad for t in (x, *rest) if isinstance(t, Tensor) and t.requires_grad])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-4)
    kept = [(e, n) for e in range(4) for n in ("gate_proj", "up_proj", "down_proj") if mixed(e, n) is None]
    for e, projection in kept:
        stack = new._stack(projection, e)
        grad = stack.of_one(getattr(new, stack.tensor("weight")).grad, projection, e)
        p = reference.get_parameter(new.layout.projection(projection).parameter)
        shell = copy.deepcopy(reference)
        shell.load_state_dict({k: v.grad if v.grad is not None else v for k, v in reference.named_parameters()})
        assert p.grad is not None
        assert_close(grad, expert_weight(shell, new.layout, projection, e).detach(), 1e-4)


@pytest.mark.parametrize(
    "name",
    ["MixtralExperts", "GptOssExperts", "Llama4TextExperts", "DbrxExperts", "Step3p7Experts", "NemotronHExperts"],
)
@pytest.mark.parametrize("choose", [always("int4-g32"), mixed], ids=["one", "mixed"])
def test_compiles_to_one_graph_forward_and_backward(name: str, choose: Choice) -> None:
    torch._dynamo.reset()
    module = experts_module(name)
    new, _ = quantized(module, choose)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (compiled, new):
        x, *rest = arguments(module)
        x.requires_grad_()
        y = call(x, *rest)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad))
    assert_close(grads[0][0], grads[1][0])
    assert_close(grads[0][1], grads[1][1])


def test_compiles_with_inductor() -> None:
    module = experts_module("GptOssExperts")
    new, _ = quantized(module, always("int4-g32"))
    args = arguments(module)
    assert_close(torch.compile(new, fullgraph=True)(*args), new(*args))


def test_only_hit_experts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes of the others hold what gives nan, and the bytes that are decoded are those of the hit ones."""
    from fxquant import expert_matmul

    module = experts_module("MixtralExperts")
    new, reference = quantized(module, always("int4-g32"))
    x, ids, weights = arguments(module)
    ids = ids % 2 * 2
    for name in ("gate_up_proj_scales", "down_proj_scales"):
        getattr(new, name)[1::2] = float("nan")
    read_bytes = 0
    original = expert_matmul.dequantize

    def counted(planes: dict[str, Tensor], *args: Any) -> Tensor:
        nonlocal read_bytes
        read_bytes += sum(plane.numel() * plane.element_size() for plane in planes.values())
        return original(planes, *args)

    monkeypatch.setattr(expert_matmul, "dequantize", counted)
    assert_close(new(x, ids, weights), reference(x, ids, weights))
    assert read_bytes == sum(stack.nbytes for stack in new.stacks) // 2
