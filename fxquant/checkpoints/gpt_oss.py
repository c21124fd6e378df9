"""The MXFP4 experts of gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import MX_GROUP, mx
from fxquant.checkpoints.source import Planes, Source


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
