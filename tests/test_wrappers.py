"""Quantized models inside what others wrap around models: DDP, FSDP, accelerate's device maps, PEFT-like adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxquant import dequantize, quantize
from fxquant.modules import QLinear


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.LayerNorm(64))
    return quantize(model, [("0", "int4-g32"), ("2", "fp8")], example_inputs=(torch.randn(2, 64),), progress=False)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    y = model(torch.linspace(-1, 1, 128).view(2, 64))
    y.square().sum().backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


@pytest.mark.usefixtures("process_group")
def test_ddp() -> None:
    expected, grads = step(net())
    got, found = step(nn.parallel.DistributedDataParallel(net()))
    assert torch.equal(got, expected)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.usefixtures("process_group")
def test_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard

    expected, grads = step(net())
    model = net()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    got, found = step(model)
    assert torch.equal(got, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad)
    planes = model[0].planes
    assert all(type(plane) is Tensor for plane in planes.values())


def test_accelerate_hooks_follow_the_module() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    seen: list[str] = []

    class Spy(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[tuple[Tensor, ...], dict]:
            seen.append(type(module).__name__)
            return args, kwargs

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    hooks.add_hook_to_module(model[0], Spy())
    quantize(model, "int8", example_inputs=(torch.randn(2, 64),), progress=False)
    assert isinstance(model[0], QLinear)
    model(torch.randn(2, 64))
    dequantize(model)
    model(torch.randn(2, 64))
    assert seen == ["QLinear", "Linear"]


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tiny_models import tiny_model
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    plain = quantize(AutoModelForCausalLM.from_pretrained(tmp_path), "int8", progress=False)
    mapped = quantize(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}), "int8", progress=False)
    with torch.no_grad():
        assert torch.equal(mapped(tokens).logits, plain(tokens).logits)


def test_it_is_an_nn_linear_to_adapters() -> None:
    """PEFT wraps whatever is an nn.Linear, and reads its sizes, dtype and device from these attributes."""
    linear = net()[0]
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (64, 32)
    assert linear.weight.shape == (32, 64)
    assert (linear.weight.dtype, linear.weight.device.type) == (torch.float32, "cpu")
    assert "RANK" not in os.environ
