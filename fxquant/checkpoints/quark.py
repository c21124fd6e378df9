"""AMD Quark."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import fp4_codes, fp8, mx, scaled
from fxquant.checkpoints.integers import affine
from fxquant.checkpoints.packing import awq, stream
from fxquant.checkpoints.source import FLOATS, Planes, Source
from fxquant.scheme import Activation

DTYPES = ("fp8_e4m3", "int8", "int4", "uint4", "fp4")
PACK_METHODS = ("reorder", "order")


def planes_of_quark(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    dtype: str,
    group_size: int = -1,
    pack_method: str = "reorder",
    activation: Activation | None = None,
) -> Planes:
    """The planes of a linear that AMD Quark exported (0.13).

    Args:
        tensors: `weight` and `weight_scale`. fp8_e4m3, int8: `[N, K]`, and one scale or `[N]`. int4 (two's
            complement), uint4: int32 `[K, N / 8]`, `[G, N]`, and `weight_zero_point` int32 `[G, N / 8]`. fp4 (MXFP4):
            uint8 `[N, K / 2]` and exponents, uint8 `[N, K / 32]`.
        n: output features.
        k: input features.
        dtype: of the weight: one of `DTYPES`.
        group_size: columns that share a scale, of int4 and uint4; -1: all.
        pack_method: `reorder` as AutoAWQ orders eight codes, or `order`.
        activation: how the input is quantized; static: by `input_scale`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"Quark {dtype}", tensors, n, k)
    source.require(dtype in DTYPES, f"the dtype is none of {', '.join(DTYPES)}")
    source.require(pack_method in PACK_METHODS, f"the pack_method {pack_method!r} is none of {', '.join(PACK_METHODS)}")
    if dtype == "fp8_e4m3":
        return fp8(source, "weight_scale", None, activation)
    if dtype == "fp4":
        return mx(source, fp4_codes(source, "weight"), "e2m1", "weight_scale")
    if dtype == "int8":
        return _int8(source, activation)
    source.require(n % 8 == 0, "N is no multiple of 8")
    group = source.group(group_size)
    shape = (k // group, n // 8)
    fields = _unpacked(source.take("weight", torch.int32, (k, n // 8)), pack_method).t()
    scales = source.take("weight_scale", FLOATS, (k // group, n)).t()
    zeros = _unpacked(source.take("weight_zero_point", torch.int32, shape), pack_method).t()
    if dtype == "uint4":
        return affine(source, fields, 4, scales, zeros, source.block(group))
    return affine(source, fields ^ 8, 4, scales, zeros ^ 8, source.block(group), None, activation)


def _int8(source: Source, activation: Activation | None) -> Planes:
    codes = source.take("weight", torch.int8, (source.n, source.k))
    if "weight_zero_point" in source.tensors:
        zeros = source.take("weight_zero_point", (torch.int8, torch.int32, *FLOATS))
        source.require(not zeros.any(), "it has zero points, and int8 weights of Quark are symmetric")
    return scaled(source, codes, "int8", source.take("weight_scale", FLOATS), None, activation)


def _unpacked(words: Tensor, pack_method: str) -> Tensor:
    return awq(words) if pack_method == "reorder" else stream(words, 4, words.shape[1] * 8)
