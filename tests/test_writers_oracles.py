"""Tensors in the formats of others are decoded by the libraries, and by formulas of their own, to our weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_planes import random_planes
from torch import Tensor, nn

from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.checkpoints import planes_of_bnb4
from fxquant.checkpoints.awq import tensors_of_awq
from fxquant.checkpoints.bitsandbytes_tensors import tensors_of_bnb4, tensors_of_bnb8
from fxquant.checkpoints.compressed_tensors_layouts import layout_of
from fxquant.checkpoints.compressed_tensors_tensors import tensors_of_compressed_tensors
from fxquant.checkpoints.gpt_oss import tensors_of_gpt_oss
from fxquant.checkpoints.gptq import tensors_of_gptq
from fxquant.codecs import dequantize
from fxquant.scheme import Scheme
from fxquant.writers import WRITERS

HALVES = (torch.float16, torch.bfloat16)


def stream(words: Tensor, bits: int) -> Tensor:
    """Fields of a little-endian bit stream along the last dimension, bit by bit."""
    ones = ((words.long() & 0xFFFFFFFF).unsqueeze(-1) >> torch.arange(32)) & 1
    fields = ones.flatten(-2)
    count = fields.shape[-1] // bits
    return (fields[..., : count * bits].unflatten(-1, (count, bits)) << torch.arange(bits)).sum(-1)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g32-fp16", 4),
        ("uint4-g32-fp16-perm", 4),
        ("int3-g64-fp16", 3),
        ("uint2-g32-fp16", 2),
        ("uint8-row-fp16", 8),
        ("int6-g32-fp16-perm", 8),
        ("int4-b8x64-fp16", 4),
    ],
)
def test_gptq(name: str, bits: int) -> None:
    scheme, n, k = Scheme.parse(name), 64, 128
    planes = random_planes(scheme, n, k)
    tensors = tensors_of_gptq(scheme, planes, n, k)
    codes, zeros = stream(tensors["qweight"].t(), bits).t(), stream(tensors["qzeros"], bits)
    groups = tensors["g_idx"].long()
    assert codes.shape == (k, n)
    weight = (tensors["scales"].float()[groups] * (codes - zeros[groups])).t()
    assert torch.equal(weight, dequantize(planes, scheme, n, k))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("int4-g32-fp16", 32),
        ("uint4-g64-fp16", 64),
        ("uint4-g64-fp16", 32),
        ("uint4-row-fp16", 64),
        ("uint3-g32-fp16", 32),
        ("int4-b8x64-fp16", 32),
    ],
)
def test_awq(name: str, group: int) -> None:
    scheme, n, k = Scheme.parse(name), 40, 128
    planes = random_planes(scheme, n, k)
    tensors = tensors_of_awq(scheme, planes, n, k, group_size=group)
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
    codes, zeros = (((tensors[t].unsqueeze(-1) >> shifts) & 15).flatten(1) for t in ("qweight", "qzeros"))
    spread = (codes - zeros.repeat_interleave(group, 0)) * tensors["scales"].float().repeat_interleave(group, 0)
    assert torch.equal(spread.t(), dequantize(planes, scheme, n, k))


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq", "fp4-flat128-dq", "nf4-flat32", "nf4-g64-fp16"])
@pytest.mark.parametrize(("n", "k"), [(8, 256), (48, 128)])
def test_bitsandbytes_4bit(name: str, n: int, k: int) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    scheme = Scheme.parse(name)
    planes = random_planes(scheme, n, k)
    tensors = tensors_of_bnb4(scheme, planes, n, k, dtype=torch.float32)
    state = bnb.QuantState.from_dict({key: tensor for key, tensor in tensors.items() if key != "weight"}, "cpu")
    assert state.shape == (n, k)
    assert state.nested == scheme.double
    found, ours = bnb.dequantize_4bit(tensors["weight"], state), dequantize(planes, scheme, n, k)
    assert (found - ours).abs().max() <= (2.0**-22 * ours.abs().max() if scheme.double else 0)


@pytest.mark.parametrize("name", ["nf4-dq", "fp4"])
def test_what_bitsandbytes_writes_is_written(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type=name[:3], compress_statistics="dq" in name)
    theirs = {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}
    ours = tensors_of_bnb4(*planes_of_bnb4(theirs, 16, 128), 16, 128, dtype=torch.float32)
    blob = f"weight.quant_state.bitsandbytes__{name[:3]}"
    assert ours.keys() == theirs.keys()
    assert bytes(ours[blob].tolist()).rstrip() == bytes(theirs[blob].tolist())
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != blob)


def test_bitsandbytes_8bit() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    scheme, n, k = Scheme.parse("llm-int8"), 24, 64
    planes = random_planes(scheme, n, k)
    tensors = tensors_of_bnb8(scheme, planes, n, k)
    found, ours = bnb.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]), dequantize(planes, scheme, n, k)
    assert (found - ours).abs().max() <= 2.0**-21 * ours.abs().max()


def group_of(scheme: Scheme, n: int, k: int, tmp_path: Path) -> Any:
    """The settings of a checkpoint with a single linear, as the library reads them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    matrix = Matrix("linear", "linear", n, k, scheme)
    contents = Contents(tmp_path, None, nn.ModuleDict({"linear": nn.Linear(k, n)}), {"linear": matrix}, {})
    config = quantization.QuantizationConfig.model_validate(WRITERS["compressed-tensors"].config(contents))
    (group,) = config.config_groups.values()
    return group


FORMATS = "int4-g32 uint4-g32 int2-g32 int3-g64 uint5-g32 int6-row int8-row uint8-row int8-tensor int8+int8 uint8+int8 "
FORMATS += "int4-g32+int8 int4-g32+fp8 int8-tensor+int8-static fp8 fp8+fp8 fp8-tensor+fp8-static fp8-b16x16 fp8-g32 "
FORMATS += "fp8-b16x32+fp8-g32 mxfp4 mxfp6 mxfp8 nvfp4 int4-b8x32 int4-g32-e8m0"


@pytest.mark.parametrize("name", FORMATS.split())
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    formats = pytest.importorskip("compressed_tensors.compressors.format")
    scheme, n, k = Scheme.parse(name), 48, 128
    planes = random_planes(scheme, n, k)
    settings = group_of(scheme, n, k, tmp_path)
    layout = layout_of(scheme, n, k)
    tensors = tensors_of_compressed_tensors(scheme, planes, n, k)
    assert settings.format == layout.format == formats.infer_module_format(nn.Linear, settings).value
    compressor = compressors.BaseCompressor.get_value_from_registry(layout.format)
    names = {*compressor.compression_param_names(settings), *({"input_scale"} & tensors.keys())}
    assert tensors.keys() == names
    given = {key: tensor.float() if tensor.dtype in HALVES else tensor for key, tensor in tensors.items()}
    found, ours = compressor.decompress(given, settings)["weight"], dequantize(planes, scheme, n, k)
    if found.dtype == torch.bfloat16:  # MX and NVFP4 are decompressed to it
        assert (found - ours).abs().max() <= 2.0**-8 * ours.abs().max()
    else:
        assert torch.equal(found, ours)


def test_zero_points_packed_by_the_library(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    scheme, n, k = Scheme.parse("uint5-g32"), 20, 96
    tensors = tensors_of_compressed_tensors(scheme, random_planes(scheme, n, k), n, k)
    zeros = helpers.unpack_from_int32(tensors["weight_zero_point"], 5, torch.Size((n, 3)), packed_dim=0)
    assert torch.equal(helpers.pack_to_int32(zeros, 5, packed_dim=0), tensors["weight_zero_point"])
    codes = helpers.unpack_from_int32(tensors["weight_packed"], 5, torch.Size((n, k)))
    assert torch.equal(helpers.pack_to_int32(codes, 5), tensors["weight_packed"])


def test_gpt_oss() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    scheme, n, k = Scheme.parse("mxfp4"), 8, 96
    made = [random_planes(scheme, n, k, seed) for seed in range(3)]
    parts = [tensors_of_gpt_oss(scheme, planes, n, k) for planes in made]
    blocks, scales = (torch.stack([part[name] for part in parts]) for name in ("blocks", "scales"))
    found = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ours = torch.stack([dequantize(planes, scheme, n, k) for planes in made])
    assert torch.equal(found.transpose(1, 2), ours)
