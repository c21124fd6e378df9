"""NVIDIA ModelOpt: FP8, NVFP4, INT4 AWQ, MX and SmoothQuant exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.checkpoints.floats import fp4_codes, fp8, mx, nvfp4, scaled
from fxquant.checkpoints.integers import affine
from fxquant.checkpoints.source import E4M3, FLOATS, Planes, Source
from fxquant.scheme import Activation, Block

ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"),
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ"),
    *("W4A16_AWQ", "W4A8_AWQ", "MXFP4", "MXFP8", "W8A8_SQ_PER_CHANNEL"),
)


def planes_of_modelopt(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    quant_algo: str,
    group_size: int = 128,
    activation: Activation | None = None,
) -> Planes:
    """The planes of a linear that NVIDIA ModelOpt exported (0.47).

    Args:
        tensors: `weight`, `weight_scale` and, as the algorithm has them, `weight_scale_2` (NVFP4: multiplies; W4A8_AWQ:
            meant for a kernel and left alone), `input_scale` and `pre_quant_scale` `[K]`, which multiplies the input.
        n: output features.
        k: input features.
        quant_algo: one of `ALGORITHMS`, in any case.
        group_size: columns that share a scale, of the AWQ algorithms.
        activation: how the input is quantized; static: by `input_scale`.

    Returns:
        The scheme and its planes; a `pre_quant_scale` scales columns.

    Raises:
        CheckpointError: tensors that are not these.
    """
    algorithm = quant_algo.upper()
    source = Source(f"ModelOpt {algorithm}", tensors, n, k)
    source.require(algorithm in ALGORITHMS, f"the algorithm is none of {', '.join(ALGORITHMS)}")
    scheme, planes = _weight(source, algorithm, group_size)
    if "pre_quant_scale" in tensors:
        planes["column_scales"] = source.take("pre_quant_scale", FLOATS, (k,)).to(torch.float32)
        scheme = replace(scheme, columns=("scale",))
    return source.finish(scheme, planes, activation)


def _weight(source: Source, algorithm: str, group_size: int) -> Planes:
    n, k = source.n, source.k
    if "NVFP4" in algorithm:
        return nvfp4(source, fp4_codes(source, "weight"), "weight_scale", source.scalar("weight_scale_2"))
    if algorithm == "MXFP4":
        return mx(source, fp4_codes(source, "weight"), "e2m1", "weight_scale")
    if algorithm == "MXFP8":
        return mx(source, source.take("weight", E4M3, (n, k)).view(torch.uint8), "fp8", "weight_scale")
    if algorithm == "FP8_PB_WO":
        return _blocks(source)
    if "AWQ" in algorithm:
        return _awq(source, source.group(group_size))
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        codes = source.take("weight", torch.int8, (n, k))
        return scaled(source, codes, "int8", source.take("weight_scale", FLOATS, (n,), (n, 1)))
    return fp8(source, "weight_scale")


def _blocks(source: Source) -> Planes:
    """FP8 in blocks of 128 x 128, with scales `[N / 128, 1, K / 128, 1]`."""
    block = Block(128, 128)
    rows, columns = block.grid(source.n, source.k)
    codes = source.take("weight", E4M3, (source.n, source.k)).view(torch.uint8)
    scales = source.take("weight_scale", FLOATS, (rows, 1, columns, 1), (rows, columns)).view(rows, columns)
    return scaled(source, codes, "fp8", scales, block)


def _awq(source: Source, group: int) -> Planes:
    """Signed 4-bit integers in two's complement, of two rows in one row of bytes."""
    n, k = source.n, source.k
    source.require(n % 2 == 0, "N is odd")
    packed = source.take("weight", torch.uint8, (n // 2, k))
    fields = torch.stack((packed & 15, packed >> 4), 1).view(n, k) ^ 8
    scales = source.take("weight_scale", FLOATS, (n, k // group))
    return affine(source, fields, 4, scales, None, source.block(group))
