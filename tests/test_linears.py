import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional

from fxquant.linears import LinearSite, find_linears, find_stacked, is_expert_stack
from fxquant.modules import QLinear
from fxquant.scheme import Scheme


def only(module: nn.Module) -> LinearSite:
    (site,) = find_linears(nn.ModuleDict({"m": module}))
    return site


def test_names_shapes_and_order() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 7, bias=False)), nn.Conv1d(2, 2, 1))
    first, second = find_linears(model)
    assert (first.name, first.n, first.k, first.transposed, first.obstacle) == ("0", 3, 5, False, None)
    assert (second.name, second.n, second.k, second.bias) == ("1.1", 7, 3, None)
    assert first.weight is model[0].weight
    assert first.bias is model[0].bias


def test_a_module_under_two_names_comes_once() -> None:
    shared = nn.Linear(4, 4)
    (site,) = find_linears(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert (site.name, site.aliases) == ("a", ("a", "b.0"))


def test_two_modules_with_one_weight_are_two_sites() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    assert [site.name for site in find_linears(nn.Sequential(a, b))] == ["0", "1"]


def test_the_model_itself_may_be_a_linear() -> None:
    assert [site.name for site in find_linears(nn.Linear(2, 2))] == [""]


def test_sites_are_compared_by_identity() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    one, other = find_linears(model) + find_linears(model)
    assert one != other
    assert {one, other} == {other, one}


def test_conv1d_is_a_transposed_linear() -> None:
    sites = find_linears(tiny_model("gpt2"))
    by_name = {site.name: site for site in sites}
    attention = by_name["transformer.h.0.attn.c_attn"]
    assert attention.transposed
    assert attention.obstacle is None
    assert (attention.n, attention.k) == (192, 64)
    assert tuple(attention.weight.shape) == (192, 64)
    assert attention.weight.data_ptr() == attention.module.weight.data_ptr()
    assert not by_name["lm_head"].transposed


class Matmul(nn.Linear):
    """Another spelling of a linear, as Falcon has it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Summed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1)


class Fails(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no")


class WritesInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return super().forward(x / 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (3000, 700)])
def test_a_forward_that_behaves_as_a_linear_is_one(shape: tuple[int, int], bias: bool, device: str) -> None:
    assert only(Matmul(*shape, bias=bias, device=device)).obstacle is None
    assert only(WritesInput(*shape, bias=bias, device=device)).obstacle is None


@pytest.mark.parametrize("kind", [Twice, Pair, Summed, Fails])
def test_a_forward_that_does_something_else_is_an_obstacle(kind: type[nn.Linear]) -> None:
    assert only(kind(6, 4)).obstacle == f"its class {kind.__name__} has a forward that is not x @ weight.T + bias"


def test_instances_of_one_class_are_told_apart_by_their_attributes() -> None:
    plain, scaled = Scaled(4, 4), Scaled(4, 4)
    scaled.scale = 3.0
    one, other = find_linears(nn.Sequential(plain, scaled))
    assert one.obstacle is None
    assert other.obstacle is not None


def test_probing_leaves_module_hooks_and_random_state_alone() -> None:
    calls: list[Any] = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x) + torch.rand(1)

    module = Noisy(4, 4)
    module.register_forward_hook(lambda *args: calls.append(args))
    before, state, weight = dict(vars(module)), torch.random.get_rng_state(), module.weight.clone()
    assert only(module).obstacle is not None
    assert vars(module) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(module.weight, weight)
    assert calls == []


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def torchao_int8() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model[0]


def bitsandbytes_4bit() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(64, 32).to("cpu")


def with_lora() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.lora = nn.Linear(4, 4)
    return linear


def overridden() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def in_float8() -> nn.Module:
    return nn.Linear(4, 4).to(torch.float8_e4m3fn)


def quantized_already() -> nn.Module:
    return QLinear(128, 4, Scheme.parse("int4"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (weight_normed, "its weight is computed"),
        (pruned, "its weight is computed"),
        (torchao_int8, "its weight is a Int8"),
        (bitsandbytes_4bit, "its weight is a Params4bit"),
        (with_lora, "it holds more than a weight and a bias: lora"),
        (overridden, "its forward is overridden on the instance (overridden.<locals>.<lambda>)"),
        (in_float8, "its weight is float8_e4m3fn"),
        (quantized_already, "it is quantized already (int4)"),
        (lambda: nn.LazyLinear(4), "its weight is a UninitializedParameter"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "it is the output projection of nn.MultiheadAttention"),
    ],
)
def test_obstacles(make: Any, told: str) -> None:
    # What is nested in it is a linear of its own.
    site = find_linears(nn.ModuleDict({"m": make()}))[0]
    assert str(site.obstacle).startswith(told)
    assert isinstance(site.n, int)
    assert isinstance(site.k, int)


def test_packed_weights_have_the_size_that_they_stand_for() -> None:
    assert (only(bitsandbytes_4bit()).n, only(bitsandbytes_4bit()).k) == (32, 64)
    assert (only(quantized_already()).n, only(quantized_already()).k) == (4, 128)


def test_hooks_in_the_manner_of_accelerate_are_no_obstacle() -> None:
    linear = nn.Linear(4, 4)
    linear._hf_hook, linear._old_forward = object(), linear.forward
    linear.forward = lambda x: linear._old_forward(x)
    assert only(linear).obstacle is None


def test_linears_of_transformers_that_are_none() -> None:
    llama4 = {site.name: site.obstacle for site in find_linears(tiny_model("llama4_text"))}
    assert "Llama4Router has a forward" in str(llama4.pop("model.layers.0.feed_forward.router"))
    assert llama4["model.layers.0.feed_forward.shared_expert.up_proj"] is None
    assert all(site.obstacle is None for site in find_linears(tiny_model("falcon")))


def test_stacked_weights_of_experts() -> None:
    stacked = {weight.name: weight for weight in find_stacked(tiny_model("mixtral"))}
    up = stacked["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.shape, up.dtype, up.nbytes) == ((4, 256, 64), torch.float32, 4 * 256 * 64 * 4)
    assert up.module_name == "model.layers.0.mlp.experts"
    assert len(stacked) == 4


def test_experts_that_stack_rows() -> None:
    stacked = find_stacked(tiny_model("dbrx"))
    assert {weight.name.rpartition(".")[2] for weight in stacked} == {"w1", "v1", "w2"}
    assert all(weight.module_name.endswith("ffn.experts.mlp") for weight in stacked)


def test_what_is_no_stack() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(8, 1, 1))
            self.position = nn.Parameter(torch.ones(1, 16, 8))
            self.table = nn.Parameter(torch.ones(4, 8))

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(4, 4, 2), nn.Embedding(4, 4), nn.LayerNorm(4), Scales()
    )
    assert find_stacked(model) == []


def test_a_stack_under_two_names_comes_once() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

    one, other = Stack(), Stack()
    other.weight = one.weight
    assert [weight.name for weight in find_stacked(nn.Sequential(one, other))] == ["0.weight"]


def test_expert_stacks_are_told_by_their_parameters() -> None:
    class Experts(nn.Module):
        def __init__(self, up: str, dims: int) -> None:
            super().__init__()
            self.register_parameter(up, nn.Parameter(torch.ones([2] * dims)))
            self.down_proj = nn.Parameter(torch.ones([2] * dims))

    assert is_expert_stack(Experts("gate_up_proj", 3))
    assert is_expert_stack(Experts("up_proj", 3))
    assert not is_expert_stack(Experts("up_proj", 2))
    assert not is_expert_stack(Experts("other", 3))
    assert not is_expert_stack(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "phimoe", "mixtral", "gemma3_text"])
def test_a_site_computes_what_its_module_computes(kind: str) -> None:
    for site in find_linears(tiny_model(kind)):
        if site.obstacle is None:
            x = torch.randn(3, 5, site.k)
            with torch.no_grad():
                wanted = copy.deepcopy(site.module)(x)
                torch.testing.assert_close(functional.linear(x, site.weight, site.bias), wanted)
