"""Forward-mode derivatives: torch drops tangents where it finds no rule for them, and gives zeros. Modules refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad

from fxquant import dequantize, quantize
from fxquant.errors import ModelError
from fxquant.expert_modules import QExperts

IDS, SHARES = torch.tensor([[0, 2], [1, 0]]), torch.ones(2, 2)


def linear(recipe: str) -> Callable[[], nn.Module]:
    return lambda: quantize(nn.Sequential(nn.Linear(64, 48)), recipe, example_inputs=(torch.randn(1, 64),))


def experts_of(kind: str, recipe: Any) -> nn.Module:
    model = quantize(tiny_model(kind), recipe, example_inputs={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    return next(module for module in model.modules() if isinstance(module, QExperts))


def experts() -> nn.Module:
    return experts_of("qwen3_moe", "int8")


def call(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return (lambda x: module(x, IDS, SHARES)) if isinstance(module, QExperts) else module


@pytest.mark.parametrize("make", [linear("int4-g32"), linear("int8+int8"), experts])
def test_modules_refuse_tangents(make: Callable[[], nn.Module]) -> None:
    module = make().requires_grad_(False)
    f, x = call(module), torch.randn(2, 64)
    want = f(x)
    with pytest.raises(ModelError, match="no forward-mode derivatives"):
        torch.func.jvp(f, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(ModelError, match="no forward-mode derivatives"):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(f(x), want)  # no tangent, no error


@pytest.mark.parametrize("make", [linear("int4-g32"), experts])
def test_tangents_are_refused_where_torch_compiles(make: Callable[[], nn.Module]) -> None:
    f, x = call(make().requires_grad_(False)), torch.randn(2, 64)
    compiled = torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(ModelError, match="no forward-mode derivatives"):
        compiled(x)


def test_tangents_of_biases_are_refused() -> None:
    module, x, bias = linear("int4-g32")(), torch.randn(2, 64), torch.randn(48)
    with pytest.raises(ModelError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda b: torch.func.functional_call(module, {"0.bias": b}, (x,)), (bias,), (bias,))


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias", "down_proj"])
def test_tangents_of_parameters_of_experts_are_refused(name: str) -> None:
    rules = [("*.experts.*.down_proj", "keep"), ("*", "int8")]
    module = experts_of("gpt_oss", rules if name == "down_proj" else "int8").requires_grad_(False)
    own = dict(module.named_parameters())[name]
    x = torch.randn(2, 64)
    with pytest.raises(ModelError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda p: torch.func.functional_call(module, {name: p}, (x, IDS, SHARES)), (own,), (own,))


def test_shares_of_experts_have_forward_derivatives() -> None:
    """They are multiplied outside of the op, where gradients may be wanted."""
    module, x = experts(), torch.randn(2, 64)
    forwards = torch.func.jvp(lambda shares: module(x, IDS, shares), (SHARES,), (SHARES,))[1]
    torch.testing.assert_close(forwards, module(x, IDS, SHARES))  # linear in them
    with torch.no_grad(), pytest.raises(ModelError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda shares: module(x, IDS, shares), (SHARES,), (SHARES,))


def test_what_the_error_offers_is_there() -> None:
    model, x = linear("int4-g32")(), torch.randn(1, 64)
    backwards = torch.autograd.functional.jacobian(model, x)
    plain = dequantize(model)
    forwards = torch.func.jacfwd(plain)(x)
    torch.testing.assert_close(backwards, forwards)
    torch.testing.assert_close(forwards[0, :, 0], plain[0].weight)
