"""Forward-mode derivatives: torch drops tangents where it finds no rule for them, and gives zeros. Modules refuse."""

from __future__ import annotations

from collections.abc import Callable

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


def experts() -> nn.Module:
    model = quantize(tiny_model("qwen3_moe"), "int8", example_inputs={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    return next(module for module in model.modules() if isinstance(module, QExperts))


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


def test_what_the_error_offers_is_there() -> None:
    model, x = linear("int4-g32")(), torch.randn(1, 64)
    backwards = torch.autograd.functional.jacobian(model, x)
    plain = dequantize(model)
    forwards = torch.func.jacfwd(plain)(x)
    torch.testing.assert_close(backwards, forwards)
    torch.testing.assert_close(forwards[0, :, 0], plain[0].weight)
