"""Other libraries' ways to multiply bfloat16 rows by a weight on a CUDA GPU; those that do not run say why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from linear_methods import Method, copies_of
from linear_rivals import aten_planes, bitsandbytes_nf4, inductor, inductor_int8_int8
from torch import Tensor

from fxquant import codecs
from fxquant.scheme import Scheme

BASE = "bf16"
_FEWEST = {"Inductor int8+int8": 17}
"""Rows that a method needs: torch's product of int8 matrices has no fewer."""


def cublas(weight: Tensor, megabytes: float) -> Method:
    def copy() -> Callable[[Tensor], Tensor]:
        held = weight.clone()
        return lambda x: F.linear(x, held)

    copies = [copy() for _ in range(copies_of(weight.nbytes, megabytes))]
    return Method(BASE, True, copies, weight.float(), nbytes=weight.nbytes)


def tinygemm(weight: Tensor, megabytes: float) -> Method:
    """ATen's int4 for GPUs, the kernel of torchao's weights of 4 bits."""
    scheme, (n, k) = Scheme.parse("int4-g128"), weight.shape
    planes, fields, scales = aten_planes(weight)
    pairs = (fields[:, ::2] << 4 | fields[:, 1::2]).contiguous()

    def copy() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)

    nbytes = n * k // 2 + scales.nbytes
    copies = [copy() for _ in range(copies_of(nbytes, megabytes))]
    return Method("tinygemm int4", True, copies, codecs.dequantize(planes, scheme, n, k), nbytes=nbytes)


def inductor_int4(weight: Tensor, megabytes: float) -> Method:
    return inductor("int4", weight, megabytes)


def scaled_fp8(weight: Tensor, megabytes: float) -> Method:
    """torch's product of float8 with a scale per row of both sides, behind a compiled quantization of x."""
    top = torch.finfo(torch.float8_e4m3fn).max

    def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True).float() / top
        return (x.float() / scale).clamp(-top, top).to(torch.float8_e4m3fn), scale

    @torch.compile(dynamic=False, fullgraph=True)
    def multiply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        own, of_x = rows_of(x)
        return torch._scaled_mm(own, codes.t(), of_x, scale.t(), out_dtype=torch.bfloat16)

    codes, scale = rows_of(weight)

    def copy() -> Callable[[Tensor], Tensor]:
        held = codes.clone()
        return lambda x: multiply(x, held, scale)

    nbytes = codes.nbytes + scale.nbytes
    copies = [copy() for _ in range(copies_of(nbytes, megabytes))]
    return Method("torch fp8+fp8", True, copies, codes.float() * scale, nbytes=nbytes, error=0.06)


KINDS: Mapping[str, Sequence[Callable[[Tensor, float], Method]]] = MappingProxyType(
    {
        "weights alone": (cublas, tinygemm, bitsandbytes_nf4, inductor_int4),
        "activations in 8 bits too": (cublas, inductor_int8_int8, scaled_fp8),
    }
)
"""Rivals by what they quantize."""


def takes(method: Method, x: Tensor) -> bool:
    """Whether a method is for so many rows."""
    return len(x) >= _FEWEST.get(method.name, 1)
