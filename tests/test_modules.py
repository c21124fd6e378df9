"""QLinear in a model's life: devices, dtypes, copies, state dicts, hooks, training, and back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxquant.codecs import dequantize, quantize
from fxquant.errors import ModelError
from fxquant.modules import QLinear
from fxquant.scheme import Scheme


def quantized(module: nn.Module, spelling: str = "int4-g32", *, transposed: bool = False) -> QLinear:
    scheme = Scheme.parse(spelling)
    new = QLinear.replacing(module, scheme, transposed=transposed)
    weight = module.get_parameter("weight").detach()
    new.load_planes(quantize(weight.t() if transposed else weight, scheme, "absmax"))
    return new


def test_weight_is_the_dequantized_weight() -> None:
    linear = nn.Linear(64, 24, dtype=torch.bfloat16)
    new = quantized(linear)
    expected = dequantize(new.planes, new.scheme, 24, 64, torch.bfloat16)
    assert torch.equal(new.weight, expected)
    assert new.weight.dtype == torch.bfloat16
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(new(x), nn.functional.linear(x, expected, linear.bias))


def test_its_input_has_the_name_that_nn_linear_gives_it() -> None:
    new, x = quantized(nn.Linear(64, 24)), torch.randn(3, 64)
    assert torch.equal(new(input=x), new(x))


def test_what_was_on_the_module_stays() -> None:
    linear = nn.Linear(64, 24)
    calls: list[str] = []
    handle = linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    linear.train(False)
    linear.layer_index = 7
    linear.weight.requires_grad_(False)
    new = quantized(linear)
    assert new.bias is linear.bias
    assert (new.training, new.layer_index) == (False, 7)
    new(torch.randn(1, 64))
    assert calls == ["before", "after"]
    handle.remove()
    new(torch.randn(1, 64))
    assert calls == ["before", "after", "before"]
    back = new.restore()
    assert type(back) is nn.Linear
    assert back.bias is linear.bias
    assert (back.training, back.layer_index, back.weight.requires_grad) == (False, 7, False)
    assert set(back.__dict__) == set(linear.__dict__)
    back(torch.randn(1, 64))
    assert calls == ["before", "after", "before", "before"]


def test_conv1d_comes_back_as_conv1d() -> None:
    conv = Conv1D(24, 64)
    new = quantized(conv, transposed=True)
    x = torch.randn(2, 5, 64)
    back = new.restore()
    assert type(back) is Conv1D
    assert back.weight.shape == conv.weight.shape
    torch.testing.assert_close(back(x), new(x))
    assert new.weight.shape == conv.weight.shape


@pytest.mark.parametrize("spelling", ["int4-g32", "fp8", "nf4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_changes_no_plane(spelling: str, dtype: torch.dtype) -> None:
    new = quantized(nn.Linear(64, 24), spelling)
    before = {name: plane.clone() for name, plane in new.planes.items()}
    new.to(dtype)
    assert new.weight.dtype == dtype
    assert new.bias.dtype == dtype
    for name, plane in new.planes.items():
        assert plane.dtype == before[name].dtype
        assert torch.equal(plane.view(torch.uint8), before[name].view(torch.uint8))
    assert new(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_moving_to_meta_moves_every_plane() -> None:
    new = quantized(nn.Linear(64, 24), "nf4-dq").to("meta")
    assert {t.device.type for t in new.state_dict().values()} == {"meta"}


def test_state_dict_holds_plain_tensors_and_round_trips() -> None:
    new = quantized(nn.Linear(64, 24), "nf4-dq")
    state = new.state_dict()
    assert list(state) == ["bias", "codes", "scales", "scale_scales", "scale_offset"]
    assert all(type(t) is Tensor for t in state.values())
    other = quantized(nn.Linear(64, 24), "nf4-dq")
    assert other.load_state_dict(state)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), new(x))


def test_copies_and_pickles_are_independent_and_equal() -> None:
    new = quantized(nn.Linear(64, 24))
    x = torch.randn(3, 64)
    expected = new(x)
    other = copy.deepcopy(new)
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    new.codes.zero_()
    assert torch.equal(other(x), expected)
    assert torch.equal(loaded(x), expected)


def test_bias_learns_and_the_weight_does_not() -> None:
    new = quantized(nn.Linear(64, 24))
    x = torch.randn(3, 64, requires_grad=True)
    new(x).square().sum().backward()
    assert x.grad is not None
    assert new.bias.grad is not None
    assert [name for name, _ in new.named_parameters()] == ["bias"]


def test_exports_and_compiles_with_dynamic_batch() -> None:
    model = nn.Sequential(quantized(nn.Linear(64, 32)), nn.SiLU(), quantized(nn.Linear(32, 16)))
    x = torch.randn(5, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("fxquant.linear.default") == 2
    for m in (3, 9):
        y = torch.randn(m, 64)
        torch.testing.assert_close(program.module()(y), model(y))


def test_autocast_works_through_the_module() -> None:
    new = quantized(nn.Linear(64, 24), "fp8")
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        eager = new(x)
        compiled = torch.compile(new, fullgraph=True)(x)
    assert eager.dtype == compiled.dtype == torch.bfloat16
    torch.testing.assert_close(eager, compiled)


def test_wrong_planes_and_random_initialisation_are_refused() -> None:
    new = quantized(nn.Linear(64, 24))
    with pytest.raises(ModelError, match="expected"):
        new.load_planes(quantize(torch.randn(24, 32), Scheme.parse("int4-g32"), "absmax"))
    with pytest.raises(ModelError, match="cannot be initialised"):
        new.reset_parameters()


def test_print_shows_scheme_and_bits() -> None:
    assert "scheme=int4-g32, 4.5 bits per weight" in repr(quantized(nn.Linear(64, 24)))
