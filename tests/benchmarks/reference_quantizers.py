"""The quantizers that fxquant is compared with, each as a function from a weight to what the library makes of it.

A reference gets a float32 weight whose values bfloat16 holds, quantizes it as its documentation says, and gives back a
function that decodes to float32 from what it stored, so that timing and error are measured apart. `bits` counts what
its files hold: codes, scales and zeros. Libraries that are not installed are left out, and named.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Encode = Callable[[Tensor], Callable[[], Tensor]]
"""Quantizes a weight; what it gives back decodes it."""


@dataclass(frozen=True)
class Reference:
    """One way in which a library quantizes."""

    library: str
    method: str
    bits: float
    """Per weight, as stored, for rows of 4096."""
    ours: str
    """The scheme of ours that it is compared with: of the same kind and with no more bits."""
    encode: Encode
    takes_bf16: bool = True
    """Whether it takes bfloat16 weights."""


def bitsandbytes() -> Iterator[Reference]:
    """nf4, fp4 in blocks of 64, with and without double quantization; int8 rows."""
    from bitsandbytes import functional

    def four_bits(kind: str, nested: bool) -> Encode:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
            return lambda: functional.dequantize_4bit(codes, state).float()

        return encode

    def int8(weight: Tensor) -> Callable[[], Tensor]:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return lambda: codes.float() * (scales.view(-1, 1).float() / 127)

    yield Reference("bitsandbytes", "nf4", 4.5, "nf4", four_bits("nf4", False))
    yield Reference("bitsandbytes", "nf4 double quant", 4 + 8 / 64 + 32 / 64 / 256, "nf4-dq", four_bits("nf4", True))
    yield Reference("bitsandbytes", "fp4", 4.5, "fp4", four_bits("fp4", False))
    yield Reference("bitsandbytes", "LLM.int8", 8 + 32 / 4096, "int8", int8)


def torchao() -> Iterator[Reference]:
    """Weight-only integers, floats and MX formats."""
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.quantization import granularity, quant_primitives
    from torchao.quantization.quantize_.workflows import Float8Tensor, Int8Tensor

    def int8(weight: Tensor) -> Callable[[], Tensor]:
        made = Int8Tensor.from_hp(weight, granularity.PerRow())
        return lambda: made.dequantize().float()

    def fp8(weight: Tensor) -> Callable[[], Tensor]:
        made = Float8Tensor.from_hp(weight, granularity=granularity.PerRow())
        return lambda: made.dequantize().float()

    def integers(bits: int, group: int, mapping: str) -> Encode:
        """What IntxUnpackedToInt8Tensor.from_hp computes, with its scales in bfloat16."""
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        kind = getattr(quant_primitives.MappingType, mapping)

        def encode(weight: Tensor) -> Callable[[], Tensor]:
            block = (1, group)
            scale, zero = quant_primitives.choose_qparams_affine(
                weight, kind, block, torch.int8, low, high, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8
            )
            codes = quant_primitives.quantize_affine(weight, block, scale, zero, torch.int8, low, high)
            args = (block, scale.float(), zero, torch.int8, low, high)
            return lambda: quant_primitives.dequantize_affine(codes, *args, output_dtype=torch.float32)

        return encode

    def mx(dtype: Any, name: str) -> Reference:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            made = mx_tensor.MXTensor.to_mx(weight, dtype, 32)
            return lambda: made.dequantize(torch.float32)

        return Reference("torchao", name, float(name[4]) + 8 / 32, name, encode)

    def nvfp4(weight: Tensor) -> Callable[[], Tensor]:
        scale = nvfp4_tensor.per_tensor_amax_to_scale(weight.abs().amax())
        made = nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
        return lambda: made.dequantize(torch.float32)

    yield Reference("torchao", "int8 row", 8 + 32 / 4096, "int8", int8)
    yield Reference("torchao", "fp8 row", 8 + 32 / 4096, "fp8", fp8)
    for bits in (2, 3, 4, 8):
        yield Reference("torchao", f"int{bits} g64", bits + 0.25, f"int{bits}-g64", integers(bits, 64, "SYMMETRIC"))
    yield Reference("torchao", "int4 g128", 4.125, "int4-g128", integers(4, 128, "SYMMETRIC"))
    yield Reference("torchao", "int4 g64 asym", 4.3125, "int4-g64-asym", integers(4, 64, "ASYMMETRIC"))
    yield mx(torch.float4_e2m1fn_x2, "mxfp4")
    yield mx(torch.float8_e4m3fn, "mxfp8")
    yield Reference("torchao", "nvfp4", 4.5, "nvfp4", nvfp4)


def hqq() -> Iterator[Reference]:
    """Half-quadratic quantization along K, with float16 scales and zeros."""
    from hqq.core.quantize import Quantizer

    def with_bits(bits: int, group: int) -> Encode:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            codes, meta = Quantizer.quantize(
                weight, nbits=bits, group_size=group, axis=1, optimize=True, device="cpu", round_zero=False
            )
            stored = {name: meta[name].half().float() for name in ("scale", "zero")}
            return lambda: Quantizer.dequantize(codes, {**meta, **stored}).float()

        return encode

    for bits in (2, 3, 4, 8):
        yield Reference("hqq", f"{bits} bits g64", bits + 0.5, f"uint{bits}-g64-fzero-fp16", with_bits(bits, 64))


def quanto() -> Iterator[Reference]:
    """Its default optimizers: integers with a float shift in groups of 128, int8 and fp8 rows; scales in bfloat16."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qfloat8, qint2, qint4, qint8
    from optimum.quanto.tensor.weights.quantization import quantize_weight

    def grouped(qtype: Any) -> Encode:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            scale, shift = MaxOptimizer()(weight.bfloat16(), qtype, 0, 128)
            made = quantize_weight(weight.bfloat16(), qtype, 0, scale, shift, 128, optimized=False)
            codes = made._data.unpack().float() if hasattr(made._data, "unpack") else made._data.float()
            values = codes * made._scale.float() - made._shift.float()
            return lambda: values.reshape(weight.shape)

        return encode

    def row(qtype: Any) -> Encode:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            scale = AbsmaxOptimizer()(weight.bfloat16(), qtype, 0)
            made = quantize_weight(weight.bfloat16(), qtype, 0, scale, optimized=False)
            return lambda: made._data.float() * made._scale.float()

        return encode

    yield Reference("quanto", "qint2", 2.25, "uint2-g128-bias", grouped(qint2))
    yield Reference("quanto", "qint4", 4.25, "uint4-g128-bias", grouped(qint4))
    yield Reference("quanto", "qint8", 8 + 16 / 4096, "int8-bf16", row(qint8))
    yield Reference("quanto", "qfloat8", 8 + 16 / 4096, "fp8-bf16", row(qfloat8))


def compressed_tensors() -> Iterator[Reference]:
    """Round to nearest with min-max ranges, as llm-compressor's QuantizationModifier does; scales in bfloat16."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def with_args(**settings: Any) -> Encode:
        args = QuantizationArgs(**settings)

        def encode(weight: Tensor) -> Callable[[], Tensor]:
            weight, group = weight.bfloat16(), args.group_size or weight.shape[1]
            blocks = weight.unflatten(-1, (-1, group))
            fourbit = args.strategy == "tensor_group"
            overall = generate_gparam(weight.amin(), weight.amax()) if fourbit else None
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, overall)
            codes = quantize(weight, scale, zero, args, global_scale=overall).float().unflatten(-1, (-1, group))
            factor = scale.float() / overall.float() if overall is not None else scale.float()
            values = (codes - zero.float().unsqueeze(-1)) * factor.unsqueeze(-1)
            return lambda: values.flatten(-2)

        return encode

    four = {"num_bits": 4, "type": "int", "strategy": "group"}
    name = "compressed-tensors"
    yield Reference(name, "W8 channel", 8 + 16 / 4096, "int8-bf16", with_args(num_bits=8, strategy="channel"))
    yield Reference(name, "W4 g128", 4.125, "int4-g128", with_args(**four, group_size=128))
    yield Reference(name, "W4 g128 asym", 4.15625, "int4-g128-asym", with_args(**four, group_size=128, symmetric=False))
    three = with_args(num_bits=3, type="int", strategy="group", group_size=64)
    yield Reference(name, "W3 g64", 3.25, "int3-g64", three)
    eight = with_args(num_bits=8, type="float", strategy="channel")
    yield Reference(name, "FP8 channel", 8 + 16 / 4096, "fp8-bf16", eight)
    nvfp4 = with_args(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    yield Reference(name, "NVFP4", 4.5, "nvfp4", nvfp4)
    mxfp4 = with_args(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    yield Reference(name, "MXFP4", 4.25, "mxfp4", mxfp4)


GGML_TYPES = {
    "q4_0": (2, 4.5), "q4_1": (3, 5.0), "q5_0": (6, 5.5), "q5_1": (7, 6.0), "q8_0": (8, 8.5), "q2_k": (10, 2.625),
    "q3_k": (11, 3.4375), "q4_k": (12, 4.5), "q5_k": (13, 5.5), "q6_k": (14, 6.5625), "iq4_nl": (20, 4.5),
    "iq4_xs": (23, 4.25), "tq2_0": (35, 2.0625),
}  # fmt: skip


def gguf(library: Path | None) -> Iterator[Reference]:
    """llama.cpp's quantizers without an importance matrix: all types with ggml's C library, the legacy ones without."""
    import numpy
    from gguf import GGMLQuantizationType, quants

    ggml = ctypes.CDLL(str(library)) if library else None
    if ggml is not None:
        ggml.ggml_quantize_chunk.restype = ctypes.c_size_t

    def with_type(kind: int) -> Encode:
        def encode(weight: Tensor) -> Callable[[], Tensor]:
            values = weight.numpy()
            if ggml is None:
                packed = quants.quantize(values, GGMLQuantizationType(kind))
            else:
                (n, k), per = weight.shape, quants.GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                packed = numpy.empty((n, k // per[0] * per[1]), dtype=numpy.uint8)
                pointers = (ctypes.c_void_p(array.ctypes.data) for array in (values, packed))
                sizes = (ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k))
                ggml.ggml_quantize_chunk(ctypes.c_int(kind), *pointers, *sizes, None)
            return lambda: torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType(kind)))

        return encode

    legacy = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq2_0"}
    for name, (kind, bits) in GGML_TYPES.items():
        if ggml is not None or name in legacy:
            yield Reference("ggml" if ggml else "gguf", name, bits, name, with_type(kind), takes_bf16=False)


LIBRARIES: dict[str, tuple[str, Callable[..., Iterator[Reference]]]] = {
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "torchao": ("torchao", torchao),
    "hqq": ("hqq", hqq),
    "quanto": ("optimum.quanto", quanto),
    "compressed-tensors": ("compressed_tensors", compressed_tensors),
    "gguf": ("gguf", gguf),
}
"""Name: the module that must be importable, and what gives the references."""


def installed(name: str) -> bool:
    """Whether a library can be imported."""
    module = LIBRARIES[name][0]
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def references(names: list[str], ggml: Path | None = None) -> list[Reference]:
    """All references of these libraries."""
    found: list[Reference] = []
    for name in names:
        make = LIBRARIES[name][1]
        found += make(ggml) if name == "gguf" else make()
    return found
