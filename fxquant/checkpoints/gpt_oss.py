"""The MXFP4 experts of gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import MX_GROUP, mx
from fxquant.checkpoints.source import Planes, Source
from fxquant.checkpoints.target import Target, Written
from fxquant.scheme import Scheme


def planes_of_gpt_oss(tensors: Mapping[str, Tensor], n: int, k: int) -> Planes:
    """The planes of one projection of one expert.

    Args:
        tensors: of that expert, `blocks` uint8 `[N, K / 32, 16]`, the low half of a byte first, and `scales` uint8
            `[N, K / 32]`, exponents. Rows of `gate_up_proj` alternate between gate and up.
        n: output features.
        k: input features.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("gpt-oss MXFP4", tensors, n, k)
    groups = k // source.group(MX_GROUP)
    blocks = source.take("blocks", torch.uint8, (n, groups, MX_GROUP // 2))
    return mx(source, blocks.flatten(1), "e2m1", "scales")


def gpt_oss_obstacles(scheme: Scheme, n: int, k: int) -> list[str]:
    """What keeps the format of gpt-oss from holding a weight exactly: what it has instead."""
    found = [] if scheme == Scheme.parse("mxfp4") else [f"mxfp4 weights, not {scheme}"]
    return found + ([f"weights whose K is a multiple of {MX_GROUP}, not K={k}"] if k % MX_GROUP else [])


def tensors_of_gpt_oss(scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int) -> Written:
    """The tensors of one projection of one expert: the inverse of `planes_of_gpt_oss`.

    Args:
        scheme: `mxfp4`.
        planes: its planes; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.

    Returns:
        `blocks` uint8 `[N, K / 32, 16]`, `scales` uint8 `[N, K / 32]`.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    Target("gpt-oss MXFP4", scheme, planes, n, k).check(gpt_oss_obstacles)
    return {"blocks": planes["codes"].view(n, k // MX_GROUP, MX_GROUP // 2), "scales": planes["scales"]}
