"""Tensors that are not what they claim: refused with a `CheckpointError` and nothing else, before memory is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fxquant.checkpoints as checkpoints
from fxquant.checkpoints import Planes
from fxquant.errors import CheckpointError, FxquantError
from fxquant.scheme import Activation

FILES = sorted((Path(__file__).parent / "data" / "zoo").glob("*.safetensors"))
UNUSED = {
    *("bias", "input_global_scale", "input_scale", "output_scale"),
    *("compute_dtype", "encoded_state_dict", "nbits", "offload_meta", "optimize", "round_zero", "stores_quant_config"),
    *("unpack_view_dtype", "view_as_float", "channel_wise", "quant_scale", "quant_zero"),
}
"""What files have and decoding does not need, or may do without."""
OPTIONAL = {"g_idx", "weight_format", "weight_shape", "_weight_zero_point", "axis", "quant_scale", "quant_zero"}
HUGE = (1 << 31, 1 << 40, 1 << 62)


class Linear:
    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {key.rpartition("/")[2]: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.about = json.loads(file.metadata()["about"])
        self.n, self.k = tensors.pop("expected").shape
        self.tensors: dict[str, Tensor] = tensors

    def planes(self, tensors: dict[str, Tensor], n: int, k: int, **changed: Any) -> Planes:
        call, settings = self.about["call"], {**self.about["settings"], **changed}
        if call == "gguf":
            blocks = tensors.get("blocks")
            if blocks is None:
                raise CheckpointError("a test without blocks is none")
            return checkpoints.planes_of_gguf(blocks, settings["type_name"], n, k)
        if call == "torchao":
            settings["block_size"] = (1, self.k)
        return getattr(checkpoints, f"planes_of_{call}")(tensors, n, k, **settings)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def linear(request: pytest.FixtureRequest) -> Linear:
    return Linear(request.param)


def test_what_is_missing_is_named(linear: Linear) -> None:
    for name in set(linear.tensors) - UNUSED - OPTIONAL - {"group_size", "blocks"}:
        rest = {key: tensor for key, tensor in linear.tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=name.split("bitsandbytes__")[0]):
            linear.planes(rest, linear.n, linear.k)


def test_other_dtypes(linear: Linear) -> None:
    for name in set(linear.tensors) - UNUSED:
        for dtype in (torch.float64, torch.complex64, torch.bool):
            with pytest.raises(CheckpointError):
                linear.planes({**linear.tensors, name: linear.tensors[name].to(dtype)}, linear.n, linear.k)


def reshaped(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor[None, None]
    yield tensor.new_empty(0)
    yield tensor.new_empty((0, *tensor.shape))
    if tensor.ndim:
        yield tensor[:-1]
        yield tensor[..., :-1]
        yield torch.cat((tensor, tensor))
        yield torch.cat((tensor, tensor), -1)
        yield tensor.new_empty(()).expand((1 << 40, *tensor.shape[1:]))
        yield tensor.new_empty(()).expand((*tensor.shape[:-1], 1 << 40))
    yield tensor.to("meta")
    if tensor.dtype in (torch.float32, torch.uint8, torch.int8, torch.int32, torch.float16):
        yield tensor.to_sparse()


def test_other_shapes(linear: Linear) -> None:
    for name in set(linear.tensors) - UNUSED:
        for tensor in reshaped(linear.tensors[name]):
            given = {**linear.tensors, name: tensor}
            if tensor.numel() == linear.tensors[name].numel() and tensor.layout == torch.strided and not tensor.is_meta:
                assert_same_or_refused(linear, given)
                continue
            with pytest.raises(CheckpointError):
                linear.planes(given, linear.n, linear.k)


def assert_same_or_refused(linear: Linear, tensors: dict[str, Tensor]) -> None:
    """One number may come with any number of dimensions."""
    try:
        _, planes = linear.planes(tensors, linear.n, linear.k)
    except CheckpointError:
        return
    _, expected = linear.planes(linear.tensors, linear.n, linear.k)
    assert all(torch.equal(planes[name], plane) for name, plane in expected.items())


def test_other_sizes(linear: Linear) -> None:
    sizes = ((linear.n + 1, linear.k), (linear.n, linear.k + 1), (linear.k, linear.n), (0, linear.k), (-1, -1))
    for n, k in sizes:
        if (n, k) == (linear.n, linear.k):
            continue
        with pytest.raises(CheckpointError):
            linear.planes(linear.tensors, n, k)
    for huge in HUGE:
        for n, k in ((huge, linear.k), (linear.n, huge), (huge, huge)):
            with pytest.raises(CheckpointError):
                linear.planes(linear.tensors, n, k)


def test_any_bytes(linear: Linear) -> None:
    """Whatever numbers there are in tensors of the right shape: planes, or an error of fxquant."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in linear.tensors.items():
        for _ in range(5):
            noise = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8, generator=generator)
            noisy = {**linear.tensors, name: noise.view(tensor.dtype).view(tensor.shape)}
            try:
                scheme, planes = linear.planes(noisy, linear.n, linear.k)
            except FxquantError:
                continue
            assert list(planes) == list(scheme.planes(linear.n, linear.k))


def test_settings_that_do_not_fit(linear: Linear) -> None:
    bad = {
        "bits": [0, 1, 9, 40, -4],
        "group_size": [0, -2, 1 << 40, linear.k * 2, 7],
        "checkpoint_format": ["marlin", ""],
        "format": ["marlin-24", ""],
        "qtype": ["qint3", ""],
        "kind": ["Int4Tensor", ""],
        "quant_algo": ["FP4", ""],
        "dtype": ["int5", ""],
        "weight_block_size": [[0, 128], [128, 0], [64, 128], [128], [1 << 40, 1]],
        "type_name": ["Q4_K_M", ""],
    }
    for name, values in bad.items():
        for value in values if name in linear.about["settings"] else ():
            settings = linear.about["settings"]
            if name == "weight_block_size" and value == [1 << 40, 1]:
                value = [1 << 40, linear.k * 2]
                if linear.tensors["weight_scale_inv"].numel() == 1:
                    continue
            if name == "bits" and settings.get("format") == "int-quantized" and 1 <= value <= 8:
                continue
            with pytest.raises(CheckpointError):
                linear.planes(linear.tensors, linear.n, linear.k, **{name: value})


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b"[" * 60000, b'{"shape": [64, 192]}', b"\xff\xfe", b"1" * 70000])
def test_quant_states_that_are_none(state: bytes) -> None:
    linear = Linear(next(path for path in FILES if path.stem == "bnb_nf4"))
    name = "weight.quant_state.bitsandbytes__nf4"
    text = torch.frombuffer(bytearray(state or b" "), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="quant_state"):
        linear.planes({**linear.tensors, name: text}, linear.n, linear.k)


@pytest.mark.parametrize(
    "changed",
    [
        {"blocksize": 0},
        {"blocksize": 1 << 50},
        {"blocksize": "64"},
        {"blocksize": True},
        {"blocksize": 32},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": None},
        {"nested_blocksize": 128},
        {"nested_offset": float("nan")},
        {"nested_offset": 1e300},
        {"nested_offset": 10**400},
        {"nested_offset": None},
    ],
)
def test_quant_states_with_other_numbers(changed: dict[str, Any]) -> None:
    linear = Linear(next(path for path in FILES if path.stem == "bnb_nf4_dq"))
    name = "weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(linear.tensors[name].tolist())), **changed}
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError):
        linear.planes({**linear.tensors, name: text}, linear.n, linear.k)


def test_static_activations_need_their_scale() -> None:
    linear = Linear(next(path for path in FILES if path.stem == "modelopt_fp8"))
    activation = Activation("fp8", static=True)
    scheme, planes = linear.planes(linear.tensors, linear.n, linear.k, activation=activation)
    assert str(scheme) == "fp8-tensor+fp8-static"
    assert torch.equal(planes["input_scale"], linear.tensors["input_scale"].view(1))
    del linear.tensors["input_scale"]
    with pytest.raises(CheckpointError, match="no tensor 'input_scale'"):
        linear.planes(linear.tensors, linear.n, linear.k, activation=activation)


def test_errors_have_one_voice() -> None:
    tensors = {"qweight": torch.zeros(3, 4), "scales": torch.zeros(1, 8), "qzeros": torch.zeros(1, 1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.planes_of_gptq(tensors, 8, 64, bits=4, group_size=64)
    assert str(caught.value) == (
        "GPTQ weight of shape [N=8, K=64]: 'qweight' is float32 of shape [3, 4]; it has to be int32 of shape [8, 8]\n"
        "  the file is damaged, or its settings belong to another file"
    )


def test_planes_are_contiguous_and_do_not_alias_each_other(linear: Linear) -> None:
    _, planes = linear.planes(linear.tensors, linear.n, linear.k)
    assert all(plane.is_contiguous() for plane in planes.values())
    assert len({plane.data_ptr() for plane in planes.values()}) == len(planes)
