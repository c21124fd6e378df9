"""Other libraries' ways to multiply bfloat16 rows by a weight on a CPU; those that do not run say why.

torchao's run as they are, not compiled: for few rows most of their time is that of a tensor subclass in Python. Its
int4 is ATen's kernel, which is a rival by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from linear_methods import Method, copies_of, planes_of
from torch import Tensor, nn

from fxquant import codecs
from fxquant.bits import unpack
from fxquant.scheme import Scheme


def onednn(weight: Tensor, megabytes: float) -> Method:
    """What Inductor makes of a constant bfloat16 weight when it freezes a model."""

    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    copies = [copy() for _ in range(copies_of(weight.nbytes, megabytes))]
    return Method("oneDNN bf16", True, copies, weight.float(), nbytes=weight.nbytes)


def float32(weight: Tensor, megabytes: float) -> Method:
    def copy() -> Callable[[Tensor], Tensor]:
        full = weight.float()
        return lambda x: F.linear(x.float(), full).bfloat16()

    nbytes = 2 * weight.nbytes
    return Method(
        "F.linear fp32", True, [copy() for _ in range(copies_of(nbytes, megabytes))], weight.float(), nbytes=nbytes
    )


def aten_planes(weight: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Planes of int4-g128; for ATen's products, their fields `[n, k]`, and scales with zeros `[groups, n, 2]`."""
    planes = codecs.quantize(weight, Scheme.parse("int4-g128"), "absmax")
    scales = torch.stack((planes["scales"], torch.zeros_like(planes["scales"])), -1).transpose(0, 1).contiguous()
    return planes, unpack(planes["codes"], 4, weight.shape[1]), scales


def aten_int4(weight: Tensor, megabytes: float) -> Method:
    scheme, (n, k) = Scheme.parse("int4-g128"), weight.shape
    planes, fields, scales = aten_planes(weight)
    fields = fields.to(torch.int32)

    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)

    nbytes = n * k // 2 + scales.nbytes
    copies = [copy() for _ in range(copies_of(nbytes, megabytes))]
    return Method("ATen int4", True, copies, codecs.dequantize(planes, scheme, n, k), nbytes=nbytes)


def aten_int8(weight: Tensor, megabytes: float) -> Method:
    scheme, (n, k) = Scheme.parse("int8"), weight.shape
    planes = codecs.quantize(weight, scheme, "absmax")
    scales = planes["scales"].view(-1).bfloat16()

    def copy() -> Callable[[Tensor], Tensor]:
        held = planes["codes"].clone()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, held, scales)

    copies = [copy() for _ in range(copies_of(n * k, megabytes))]
    return Method("ATen int8", True, copies, planes["codes"] * scales.float().view(-1, 1), nbytes=n * k + scales.nbytes)


def bitsandbytes_nf4(weight: Tensor, megabytes: float) -> Method:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape

    def copy() -> Linear4bit:
        linear = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4")
        linear.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        return linear.to(weight.device).eval()

    first = copy()
    decoded = dequantize_4bit(first.weight.data, first.weight.quant_state).float()
    count = copies_of(n * k // 2, megabytes)
    nbytes = Scheme.parse("nf4").nbytes(n, k)
    return Method("bitsandbytes nf4", True, [first, *(copy() for _ in range(count - 1))], decoded, nbytes=nbytes)


def _torchao(name: str, config: Any, weight: Tensor, megabytes: float, nbytes: int, error: float) -> Method:
    from torchao.quantization import quantize_

    def copy() -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        module = nn.Sequential(linear)
        quantize_(module, config)
        module(torch.zeros(1, weight.shape[1], dtype=weight.dtype))  # what does not run on a CPU says so here
        return module

    copies = [copy() for _ in range(copies_of(nbytes, megabytes))]
    return Method(name, True, copies, weight.float(), nbytes=nbytes, error=error)


def torchao_int4(weight: Tensor, megabytes: float) -> Method:
    """Its prototype for CPUs, of ATen's int4 kernel: `Int4WeightOnlyConfig` itself has none."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    nbytes = weight.numel() // 2 + 4 * weight.numel() // 128
    config = PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
    return _torchao("torchao int4", config, weight, megabytes, nbytes, 0.15)


def torchao_int4_int8(weight: Tensor, megabytes: float) -> Method:
    from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig

    nbytes = weight.numel() // 2 + 4 * weight.numel() // 128
    config = Int8DynamicActivationInt4WeightConfig(group_size=128, set_inductor_config=False)
    return _torchao("torchao int4+int8", config, weight, megabytes, nbytes, 0.15)


def torchao_int8_int8(weight: Tensor, megabytes: float) -> Method:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return _torchao("torchao int8+int8", config, weight, megabytes, weight.numel(), 0.03)


def inductor(spelling: str, weight: Tensor, megabytes: float) -> Method:
    """Plain `torch.compile` of dequantizing and multiplying, written in plain torch, on the same planes.

    For elements of 4 bits in blocks along K under one level of scales.
    """
    scheme, k = Scheme.parse(spelling), weight.shape[1]
    size, low = scheme.block.columns or k, scheme.spec.low
    table = torch.tensor(scheme.spec.values, device=weight.device) if scheme.spec.kind == "table" else None
    assert (scheme.spec.bits, scheme.zero, scheme.outer, scheme.double, k % size) == (4, "none", None, False, 0)

    @torch.compile(dynamic=False, fullgraph=True)
    def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        fields = torch.stack((codes & 15, codes >> 4), -1).view(-1, size)
        values = fields.float() + low if table is None else table[fields.int()]
        return F.linear(x, (values * scales.view(-1, 1)).to(x.dtype).view(-1, k))

    planes, decoded = planes_of(spelling, weight, megabytes)

    def copy(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: multiply(x, held["codes"], held["scales"])

    name = f"Inductor {spelling}"
    return Method(name, True, [copy(p) for p in planes], decoded, nbytes=scheme.nbytes(*weight.shape))


def inductor_int8_int8(weight: Tensor, megabytes: float) -> Method:
    """Plain `torch.compile` of quantizing every row of x to int8, torch's product of int8 matrices, and scaling."""

    @torch.compile(dynamic=False, fullgraph=True)
    def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        steps = x.abs().amax(-1, keepdim=True).float() / 127
        rounded = (x.float() / steps).round().clamp(-127, 127).to(torch.int8)
        return (torch._int_mm(rounded, codes.T).float() * steps * scales.view(1, -1)).to(x.dtype)

    planes, decoded = planes_of("int8", weight, megabytes)

    def copy(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: multiply(x, held["codes"], held["scales"])

    nbytes = Scheme.parse("int8").nbytes(*weight.shape)
    return Method("Inductor int8+int8", True, [copy(p) for p in planes], decoded, nbytes=nbytes, error=0.03)


WEIGHT_ONLY = (onednn, float32, aten_int4, aten_int8, bitsandbytes_nf4, torchao_int4)
"""Inputs in bfloat16, or float32."""
ACTIVATIONS = (onednn, torchao_int4_int8, torchao_int8_int8, inductor_int8_int8)
"""Inputs in 8 bits, and full precision to compare with."""


def present(
    rivals: Sequence[Callable[[Tensor, float], Method]], weight: Tensor, megabytes: float
) -> tuple[list[Method], list[str]]:
    """The rivals that run here, and of each other its name and why it does not."""
    methods, absent = [], []
    for rival in rivals:
        try:
            methods.append(rival(weight, megabytes))
        except Exception as error:  # other libraries fail in every way, and a table without them is a table
            absent.append(f"{rival.__name__}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
    return methods, absent
