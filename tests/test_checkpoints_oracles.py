"""Tensors that the libraries themselves quantize decode to what they decode them to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.checkpoints import (
    Planes,
    planes_of_bnb4,
    planes_of_bnb8,
    planes_of_compressed_tensors,
    planes_of_hqq,
    planes_of_quanto,
    planes_of_torchao,
)
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError


def weight_of(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.02
    weight[:, :: max(k // 3, 1)] *= 5
    return weight.to(dtype)


def decode(planes: Planes, n: int, k: int) -> Tensor:
    return dequantize(planes[1], planes[0], n, k)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (3, 128), (5, 70), (6, 33), (300, 64)])
def test_bitsandbytes_4bit(kind: str, blocksize: int, double: bool, n: int, k: int) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(weight_of(n, k), blocksize=blocksize, quant_type=kind, compress_statistics=double)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    absmax = state.absmax
    if double:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    octets = packed.flatten()
    codes = torch.stack((octets >> 4, octets & 15), 1).flatten()[: n * k].long()
    expected = (state.code[codes] * absmax.repeat_interleave(blocksize)[: n * k]).view(n, k)
    if k % blocksize == 0:  # elsewhere, the kernel for CPUs (0.50) goes wrong
        assert torch.equal(bnb.dequantize_4bit(packed, state), expected)
    scheme, planes = planes_of_bnb4(tensors, n, k)
    assert scheme.element == kind
    assert scheme.double == double
    found = dequantize(planes, scheme, n, k)
    assert (found - expected).abs().max() <= (2 * 2.0**-23 * expected.abs().max() if double else 0)


def test_bitsandbytes_with_other_maps() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    n, k = 4, 128
    packed, state = bnb.quantize_4bit(weight_of(n, k), quant_type="nf4", compress_statistics=True)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    table, outer = tensors["weight.quant_map"] * 0.5, tensors["weight.nested_quant_map"] * 2
    scheme, planes = planes_of_bnb4({**tensors, "weight.quant_map": table, "weight.nested_quant_map": outer}, n, k)
    assert scheme.element.startswith("table(")
    assert not scheme.double
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten().long()
    scales = outer[state.absmax.long()] * state.state2.absmax[0] + state.offset
    assert torch.equal(dequantize(planes, scheme, n, k), (table[codes].view(-1, 64) * scales[:, None]).view(n, k))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_bitsandbytes_in_other_storage(storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(weight_of(4, 64), quant_type="nf4", quant_storage=storage)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    assert torch.equal(decode(planes_of_bnb4(tensors, 4, 64), 4, 64), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("threshold", [None, 0.0, 6.0])
def test_bitsandbytes_8bit(threshold: float | None) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    n, k = 6, 40
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight_of(n, k, torch.float16))
    planes = planes_of_bnb8({"weight": codes, "SCB": absmax}, n, k, threshold=threshold)
    assert str(planes[0]) == {None: "int8", 0.0: "int8+int8", 6.0: "llm-int8"}[threshold]
    expected = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.allclose(decode(planes, n, k), expected, rtol=3e-7, atol=0)


CT_SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        f"int{bits} {'sym' if symmetric else 'asym'}": (
            "pack-quantized",
            {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric},
            {"bits": bits, "group_size": 32},
        )
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for symmetric in (True, False)
    },
    "int4 channel": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
        {"bits": 4},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, {"bits": 8}),
    "int8 asym": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        {"bits": 8, "group_size": 32},
    ),
    "int4 in int8": (
        "int-quantized",
        {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True},
        {"bits": 4},
    ),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, {}),
    "fp8 channel": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {}),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        {"block_structure": (16, 32)},
    ),
    "fp8 group": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
        {"group_size": 32},
    ),
}


@pytest.mark.parametrize("name", CT_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(32, 96), (48, 128), (21, 64)])
def test_compressed_tensors(name: str, dtype: torch.dtype, n: int, k: int) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    form, args, settings = CT_SCHEMES[name]
    if "block_structure" in args and n % 16:
        n = 32
    weight = weight_of(n, k, dtype)
    arguments = quantization.QuantizationArgs(**args)
    scale, zero = utils.calculate_qparams(*_extremes(weight, args), arguments)
    tensors = {"weight": weight, "weight_scale": scale.to(dtype)}
    if not arguments.symmetric:
        tensors["weight_zero_point"] = zero
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = base.BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(tensors, scheme)
    expected = compressor.decompress(compressed, scheme)["weight"]
    found = decode(planes_of_compressed_tensors(compressed, n, k, format=form, **settings), n, k)
    assert torch.equal(found.to(expected.dtype), expected)


def _extremes(weight: Tensor, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every block."""
    n, k = weight.shape
    match args["strategy"]:
        case "tensor":
            low, high = torch.aminmax(weight.view(1, -1), dim=1)
        case "channel":
            low, high = torch.aminmax(weight, dim=1, keepdim=True)
        case "group":
            low, high = torch.aminmax(weight.view(n, -1, args["group_size"]), dim=2)
        case _:
            rows, columns = args["block_structure"]
            blocks = weight.view(n // rows, rows, k // columns, columns).transpose(1, 2).flatten(2)
            low, high = torch.aminmax(blocks, dim=2)
    return low, high


HQQ_SETTINGS = [(8, 64), (4, 64), (3, 64), (2, 16), (1, 32), (4, 128)]


@pytest.mark.parametrize(("bits", "group"), HQQ_SETTINGS)
@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(16, 128), (24, 192)])
def test_hqq(bits: int, group: int, view_as_float: bool, dtype: torch.dtype, n: int, k: int) -> None:
    if n * k % group or (n * k // group) % 8:
        group = 32
    linear = _hqq(bits, group, 1, view_as_float, dtype, n, k)
    found = decode(planes_of_hqq(linear.state_dict(), n, k), n, k)
    assert torch.equal(found, _in_float32(linear).view(n, k))


def _hqq(bits: int, group: int, axis: int, view_as_float: bool, dtype: torch.dtype, n: int, k: int) -> Any:
    quantize = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight_of(n, k, dtype)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=view_as_float)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)


def _in_float32(linear: Any) -> Tensor:
    meta = linear.meta
    packed = linear.W_q.view(meta["unpack_view_dtype"]) if meta["view_as_float"] else linear.W_q
    codes = pytest.importorskip("hqq.core.quantize").Quantizer.unpack[meta["packing"]](packed).float()
    groups = meta["scale"].numel()
    codes = codes[:groups] if meta["axis"] == 1 else codes[: meta["group_size"]]
    return (codes - meta["zero"].float()) * meta["scale"].float()


def test_hqq_groups_that_straddle_rows() -> None:
    linear = _hqq(4, 64, 1, False, torch.float32, 12, 96)
    scheme, planes = planes_of_hqq(linear.state_dict(), 12, 96)
    assert str(scheme.block) == "flat64"
    assert torch.equal(dequantize(planes, scheme, 12, 96), _in_float32(linear).view(12, 96))


def test_hqq_groups_in_strides_are_refused() -> None:
    linear = _hqq(4, 8, 0, False, torch.float32, 16, 32)
    with pytest.raises(CheckpointError, match=r"take every 2th row"):
        planes_of_hqq(linear.state_dict(), 16, 32)


def test_hqq_groups_of_whole_columns() -> None:
    linear = _hqq(4, 16, 0, False, torch.float32, 16, 32)
    scheme, planes = planes_of_hqq(linear.state_dict(), 16, 32)
    assert str(scheme.block) == "b16x1"
    assert torch.equal(dequantize(planes, scheme, 16, 32), _in_float32(linear).view(16, 32))


@pytest.mark.parametrize("qtype", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qint4", "qint2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group"), [(8, 256, 128), (6, 192, 96), (4, 64, None)])
def test_quanto(qtype: str, dtype: torch.dtype, n: int, k: int, group: int | None) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    weight, kind = weight_of(n, k, dtype), getattr(quanto, qtype)
    tensors, expected = _quanto(quanto, weight, kind, group if QUANTO_BITS[qtype] < 8 else None)
    found = decode(planes_of_quanto(tensors, n, k, qtype=qtype), n, k)
    assert torch.equal(found, expected.view(n, k))
    assert (found - weight.float()).abs().max() <= QUANTO_ERRORS[qtype] * weight.float().abs().max()


QUANTO_ERRORS = {"qint8": 1 / 64, "qfloat8_e4m3fn": 1 / 8, "qfloat8_e5m2": 1 / 4, "qint4": 1 / 4, "qint2": 1}


def _quanto(quanto: Any, weight: Tensor, kind: Any, group: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of the quantized weight, and what they stand for in float32.

    Quanto's own unpacking compiles an extension for minutes; packing does not.
    """
    if QUANTO_BITS[kind.name] == 8:
        scale = quanto.AbsmaxOptimizer()(weight, qtype=kind, axis=0)
        quantized = quanto.quantize_weight(weight, kind, 0, scale, optimized=False)
        tensors = {"weight._data": quantized._data, "weight._scale": quantized._scale}
        return tensors, quantized._data.float() * quantized._scale.float()
    scale, shift = quanto.MaxOptimizer()(weight, qtype=kind, axis=0, group_size=group)
    quantized = quanto.quantize_weight(weight, kind, 0, scale, shift, group, optimized=False)
    tensors = {
        "weight._data._data": quantized._data._data,
        "weight._scale": quantized._scale,
        "weight._shift": quantized._shift,
    }
    bits, packed = QUANTO_BITS[kind.name], quantized._data._data
    codes = torch.cat([packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)])[: quantized._scale.numel()]
    return tensors, codes.float() * quantized._scale.float() - quantized._shift.float()


QUANTO_BITS = {"qint8": 8, "qfloat8_e4m3fn": 8, "qfloat8_e5m2": 8, "qint4": 4, "qint2": 2}


def _torchao(tensor: Any) -> dict[str, Tensor]:
    parts = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", [])]
    found = {f"_weight_{name}": getattr(tensor, name) for name in parts}
    return {name: part for name, part in found.items() if part is not None}


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("kind", ["int8", "int4", "uint3", "float8", "float8 tensor"])
def test_torchao(kind: str, group: int) -> None:
    ao = pytest.importorskip("torchao.quantization")
    n, k = 24, 96
    if kind.startswith("float8"):
        granularity = ao.PerTensor() if "tensor" in kind else ao.PerRow()
        tensor = ao.Float8Tensor.from_hp(weight_of(n, k), granularity=granularity)
        block, bits = tuple(tensor.block_size), 8
    elif kind == "int8":
        granularity = ao.PerGroup(group) if group else ao.PerRow()
        tensor = ao.Int8Tensor.from_hp(weight_of(n, k), granularity)
        block, bits = tuple(tensor.block_size), 8
    else:
        bits = int(kind[-1])
        target = getattr(torch, f"int{bits}")
        block = (1, group or k)
        mapping = ao.quant_primitives.MappingType
        tensor = ao.IntxUnpackedToInt8Tensor.from_hp(
            weight_of(n, k), block, target, mapping_type=mapping.ASYMMETRIC if "u" in kind else mapping.SYMMETRIC
        )
    planes = planes_of_torchao(_torchao(tensor), n, k, kind=type(tensor).__name__, block_size=block, bits=bits)
    assert torch.equal(decode(planes, n, k), tensor.dequantize().float())


@pytest.mark.parametrize("outer", [False, True])
def test_torchao_nvfp4(outer: bool) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    n, k = 32, 64
    weight = weight_of(n, k)
    scale = module.per_tensor_amax_to_scale(weight.abs().max()) if outer else None
    tensor = module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale, is_swizzled_scales=False)
    planes = planes_of_torchao(_torchao(tensor), n, k, kind="NVFP4Tensor", block_size=(1, 16))
    assert str(planes[0]) == ("nvfp4" if outer else "e2m1-g16-e4m3")
    expected = tensor.dequantize(torch.float32)
    assert (decode(planes, n, k) - expected).abs().max() <= 2 * 2.0**-23 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"])
def test_torchao_mx(dtype: str) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    n, k = 32, 96
    tensor = module.MXTensor.to_mx(weight_of(n, k, torch.bfloat16), getattr(torch, dtype), 32)
    planes = planes_of_torchao(_torchao(tensor), n, k, kind="MXTensor", block_size=(1, 32))
    assert str(planes[0]).startswith("mxfp")
    assert torch.equal(decode(planes, n, k), tensor.dequantize(torch.float32))


def test_blocks_that_are_not_whole() -> None:
    """For FP8 with a tail the oracle is arithmetic: a weight has the scale of block (row // 128, column // 128)."""
    from fxquant.checkpoints import planes_of_fp8

    for n, k in ((576, 130), (100, 300), (128, 129), (1, 1)):
        weight = weight_of(n, k).to(torch.float8_e4m3fn)
        scales = torch.rand(math.ceil(n / 128), math.ceil(k / 128)) + 0.5
        rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
        expected = weight.float() * scales[rows][:, columns]
        planes = planes_of_fp8({"weight": weight, "weight_scale_inv": scales}, n, k, weight_block_size=(128, 128))
        assert torch.equal(decode(planes, n, k), expected)


@pytest.mark.parametrize(
    "form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"]
)
def test_compressed_tensors_in_small_floats(form: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    n, k = 24, 96
    bits, size = int(form.partition("fp")[2][0]), 16 if form.startswith("nv") else 32
    weight = weight_of(n, k, torch.bfloat16)
    arguments = quantization.QuantizationArgs(
        num_bits=bits,
        type="float",
        strategy="tensor_group" if size == 16 else "group",
        group_size=size,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn if size == 16 else torch.uint8,
        zp_dtype=torch.float8_e4m3fn if size == 16 else torch.uint8,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    tops = weight.float().view(n, -1, size).abs().amax(2)
    tensors = {"weight": weight}
    if size == 16:
        tensors["weight_global_scale"] = (448 * 6 / weight.float().abs().max()).view(1)
        tensors["weight_scale"] = (tensors["weight_global_scale"] * tops / 6).to(torch.float8_e4m3fn).float()
    else:
        tensors["weight_scale"] = torch.exp2(torch.floor(torch.log2(tops)) - 2)
    compressor = base.BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(tensors, scheme)
    expected = compressor.decompress(compressed, scheme)["weight"]
    found = decode(planes_of_compressed_tensors(compressed, n, k, format=form), n, k)
    assert (found.to(expected.dtype) - expected).abs().max() <= (2.0**-8 * expected.abs().max() if size == 16 else 0)
    assert (found - weight.float()).abs().max() <= 0.3 * weight.float().abs().max()
