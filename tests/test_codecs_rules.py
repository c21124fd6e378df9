"""Searches with the name of a library: what holds for all of them, and bitsandbytes' rules."""

from __future__ import annotations

import pytest
import torch
from awkward_weights import WEIGHTS, awkward, quantized, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant import Recipe, Rule
from fxquant.codecs import SCALE_SEARCHES, dequantize, quantize
from fxquant.codecs.rules import RULES
from fxquant.errors import SchemeError
from fxquant.scheme import Scheme


def test_every_library_is_a_search() -> None:
    assert set(RULES) < set(SCALE_SEARCHES)


@settings(max_examples=150, deadline=None)
@given(*WEIGHTS, st.integers(0, 31), st.sampled_from(["int8", "llm-int8"]))
def test_int8_is_bitsandbytes(seed, n, count, dtype, magnitude, kind, odd, spelling):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = awkward(seed, n, 32 * count - odd, dtype, magnitude, kind)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    planes = quantized(weight, Scheme.parse(spelling), "bitsandbytes")
    assert (planes is None) == (not absmax.isfinite().all())
    if planes is not None:
        assert same(planes["codes"], codes)
        assert same(planes["scales"], (absmax / 127).view(n, 1))


@pytest.mark.parametrize("spelling", ["nf4", "fp4-flat128", "nf4-dq"])
def test_tables_are_absmax_for_bitsandbytes(spelling):
    scheme, weight = Scheme.parse(spelling), awkward(0, 5, 96, torch.bfloat16, 1.0, "normal")
    theirs = quantize(weight, scheme, "absmax")
    assert all(same(plane, theirs[name]) for name, plane in quantize(weight, scheme, "bitsandbytes").items())


EACH = [
    ("bitsandbytes", "int8"), ("bitsandbytes", "nf4-dq"), ("compressed-tensors", "int4-g32-asym"),
    ("compressed-tensors", "fp8-b32x32"), ("compressed-tensors", "nvfp4"), ("torchao", "int8-tensor"),
    ("torchao", "int3-g64"), ("torchao", "fp8-tensor"), ("torchao", "mxfp6"), ("torchao-no-clipping", "int4"),
    ("gguf", "q4_1"), ("gguf", "tq1_0"),
]  # fmt: skip
"""One scheme or more of each library: all kinds of blocks, zeros, biases, two levels, five codes to a byte."""


@pytest.mark.parametrize(("library", "spelling"), EACH)
def test_strides_pieces_and_given_planes_change_nothing(monkeypatch, library, spelling):
    scheme = Scheme.parse(spelling)
    wide = awkward(0, 512, 96, torch.bfloat16, 1.0, "normal")
    whole = quantize(wide.t().contiguous(), scheme, library)
    monkeypatch.setattr("fxquant.codecs.blocks.budget", lambda device: 1024)
    monkeypatch.setattr("fxquant.codecs.encode.budget", lambda device: 1024)
    monkeypatch.setattr("fxquant.codecs.rules.rule.budget", lambda device: 1024)
    out = {name: torch.stack((plane, plane), -1)[..., 1].fill_(77) for name, plane in whole.items()}
    pieces = quantize(wide.t(), scheme, library, out=out)
    for name, plane in whole.items():
        assert pieces[name] is out[name]
        if name != "scale_offset":  # a mean
            assert torch.equal(pieces[name], plane)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation made, views not counted."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize(("library", "spelling"), [each for each in EACH if each[1] != "nf4-dq"])
def test_memory_is_bounded(monkeypatch, library, spelling):
    for module in ("blocks", "rules.rule"):
        monkeypatch.setattr(f"fxquant.codecs.{module}.budget", lambda device: 2048)
    scheme, weight = Scheme.parse(spelling), awkward(0, 256, 1024, torch.bfloat16, 1.0, "normal")
    planes = quantize(weight, scheme, library)
    with Largest(weight, *planes.values()) as largest:
        quantize(weight, scheme, library, out=planes)
    # fields that are packed stand in words of 8 bytes for a moment
    assert largest.elements <= max(8 * 2048, 2 * planes["scales"].numel())


@pytest.mark.parametrize(("library", "spelling"), EACH)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_nothing_and_meta(library, spelling, shape):
    scheme = Scheme.parse(spelling)
    for weight in (torch.zeros(shape), torch.zeros(4, 256, device="meta")):
        planes = quantize(weight, scheme, library)
        assert {name: (tuple(p.shape), p.dtype) for name, p in planes.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in scheme.planes(*weight.shape).items()
        }


@pytest.mark.parametrize(
    ("library", "spelling", "has"),
    [
        ("bitsandbytes", "int8-g64", "llm-int8"),
        ("bitsandbytes", "int8-perm", "nf4"),
        ("compressed-tensors", "nf4", "mxfp8"),
        ("compressed-tensors", "fp8e5m2", "b<R>x<C>"),
        ("compressed-tensors", "uint4", "-asym"),
        ("torchao", "int4-perm", "without"),
        ("torchao", "q4_k", "e2m1-g16-e4m3"),
        ("torchao-no-clipping", "int4-asym", "without -asym"),
        ("gguf", "int4", "q5_1"),
        ("gguf", "q4_k", "K-quants"),
    ],
)
def test_a_scheme_that_a_library_does_not_have(library, spelling, has):
    for device in ("cpu", "meta"):
        with pytest.raises(SchemeError, match=f"{library} has no rule for {spelling}") as raised:
            quantize(torch.zeros(2, 256, device=device), Scheme.parse(spelling), library)
        assert has in str(raised.value)


@pytest.mark.parametrize(
    ("library", "spelling", "dtype", "value"),
    [
        ("bitsandbytes", "int8", torch.bfloat16, 1e5),
        ("gguf", "q8_0", torch.float32, 1e9),
        ("gguf", "q4_1", torch.float32, 1e6),
        ("compressed-tensors", "int4-g32-fp16", torch.float32, 1e7),
        ("compressed-tensors", "mxfp4", torch.float32, 3.3e38),
        ("torchao", "int4-g32-fp16", torch.float32, 1e7),
    ],
)
def test_no_infinite_scale_is_stored(library, spelling, dtype, value):
    weight = torch.zeros(2, 64, dtype=dtype)
    weight[1, 3], weight[0, 0] = value, 1
    with pytest.raises(SchemeError, match=f"{library} has no (finite scale|int8)"):
        quantize(weight, Scheme.parse(spelling), library)


@pytest.mark.parametrize(
    ("library", "spelling"),
    [
        ("bitsandbytes", "int8"),
        ("compressed-tensors", "int4-g128"),
        ("torchao", "fp8"),
        ("torchao-no-clipping", "int4"),
        ("gguf", "q4_1"),
    ],
)
def test_a_recipe_takes_the_name_of_a_library(library, spelling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.ReLU())
    weight, scheme = model[0].weight.detach().clone(), Scheme.parse(spelling)
    inputs = torch.randn(3, 256)
    fxquant.quantize(model, Recipe([Rule("*", spelling, scale=library)]), example_inputs=(inputs,), progress=False)
    theirs = quantize(weight, scheme, library)
    state = {name.rsplit(".", 1)[-1]: plane for name, plane in model.state_dict().items()}
    assert all(same(state[name], plane) for name, plane in theirs.items())
    expected = torch.relu(inputs @ dequantize(theirs, scheme, *weight.shape).t())
    torch.testing.assert_close(model(inputs), expected, rtol=2e-3, atol=2e-3)
