"""AWQ: AutoAWQ's layouts for three kernels; AutoRound's `auto_awq`."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.integer_parts import integer_obstacles, of_fields, scales_and_zeros
from fxquant.checkpoints.integers import affine, shifted
from fxquant.checkpoints.packing import awq, awq_fast, awq_words, stream
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div
from fxquant.checkpoints.target import Target, Written, group_of
from fxquant.scheme import Scheme

VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def planes_of_awq(
    tensors: Mapping[str, Tensor], n: int, k: int, *, group_size: int, version: str = "gemm", bits: int = 4
) -> Planes:
    """The planes of an AWQ linear (arXiv 2306.00978, in the layouts of AutoAWQ 0.2).

    Args:
        tensors: `qweight`, `qzeros` and `scales`. gemm: int32 `[K, N / 8]`, int32 `[G, N / 8]`, `[G, N]`. gemv: int32
            `[N, K / 8]`, int32 `[N, W]`, `[N, 8W]`. gemv_fast, llm-awq: int16 `[N / 4, K]`, `[8W, N]`, `[8W, N]`, where
            `qzeros` (or `scaled_zeros`) are `-scale * zero`. W is G / 8 rounded up to whole runs of the kernel.
        n: output features.
        k: input features.
        group_size: columns that share a scale; -1: all.
        version: the layout.
        bits: 4.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"AWQ {version}", tensors, n, k)
    source.require(version in VERSIONS, f"there is no such layout; there are {VERSIONS}")
    source.require(bits == 4, f"codes have 4 bits, not {bits}")
    group = source.group(group_size)
    if version == "gemm":
        source.require(n % 8 == 0, "N is no multiple of 8")
        fields = awq(source.take("qweight", torch.int32, (k, n // 8))).t()
        zeros = awq(source.take("qzeros", torch.int32, (k // group, n // 8)))
        scales = source.take("scales", FLOATS, (k // group, n))
        return affine(source, fields, 4, scales.t(), zeros.t(), source.block(group))
    width = _width(k, group)
    if version == "gemv":
        source.require(k % 8 == 0, "K is no multiple of 8")
        fields = stream(source.take("qweight", torch.int32, (n, k // 8)), 4, k)
        zeros = stream(source.take("qzeros", torch.int32, (n, width)), 4, k // group)
        scales = source.take("scales", FLOATS, (n, 8 * width))[:, : k // group]
        return affine(source, fields, 4, scales, zeros, source.block(group))
    source.require(n % 4 == 0 and k % 64 == 0, "N is no multiple of 4, or K none of 64")
    fields = awq_fast(source.take("qweight", torch.int16, (n // 4, k)))
    name = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    offsets, scales = (source.take(name, FLOATS, (8 * width, n))[: k // group].t() for name in (name, "scales"))
    return shifted(source, fields, 4, scales, offsets, source.block(group))


def awq_obstacles(scheme: Scheme, n: int, k: int, *, group_size: int) -> list[str]:
    """What keeps AWQ from holding a weight exactly under groups of so many columns (-1: all): what it has instead."""
    found = integer_obstacles(scheme, n, k, (4,))
    size, own = k if group_size == -1 else group_size, group_of(scheme, n, k)
    if own is not None and own % size:
        found.append(f"groups of {size} columns in all linears of this checkpoint, not of {own}")
    if scheme.scale != "fp16":
        found.append(f"fp16 scales, not {scheme.scale}")
    if scheme.activation is not None:
        found.append("no quantized inputs")
    if n % 8:
        found.append(f"weights whose N is a multiple of 8, not N={n}")
    if k % size:
        found.append(f"weights whose K is a multiple of the group {size}, not K={k}")
    return found


def tensors_of_awq(
    scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int, *, group_size: int | None = None
) -> Written:
    """The tensors of an AWQ linear in the layout `gemm`: the inverse of `planes_of_awq`.

    Larger blocks stand in groups of `group_size`, and narrower codes in four bits: the same weights.

    Args:
        scheme: one that `awq_obstacles` has nothing against.
        planes: as `Scheme.planes` has them; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.
        group_size: columns that share a scale; -1: all; None: those that do in the planes.

    Returns:
        `qweight` int32 `[K, N / 8]`, `qzeros` int32 `[G, N / 8]`, `scales` float16 `[G, N]`.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    target = Target("AWQ", scheme, planes, n, k)
    size = k if group_size == -1 else group_size or group_of(scheme, n, k) or k
    target.check(functools.partial(awq_obstacles, group_size=size))
    scales, zeros = scales_and_zeros(target, 4, size)
    return {
        "qweight": of_fields(target, 4, lambda rows: awq_words(rows.t()).t()).t().contiguous(),
        "qzeros": awq_words(zeros.t()),
        "scales": scales.t().contiguous(),
    }


def _width(k: int, group: int) -> int:
    """Words of zero points in a row of `gemv`."""
    run = 1 if group >= 128 else 2 if group >= 64 else 4
    return ceil_div(ceil_div(k // group, 8), run) * run
