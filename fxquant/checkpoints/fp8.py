"""FP8 checkpoints of transformers: fine-grained (DeepSeek and others), per tensor, per row, mxfp8, and FP4 experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import fp4_codes, fp8, mx
from fxquant.checkpoints.source import Planes, Source
from fxquant.scheme import Activation, Block

SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""All of them multiply, whatever they are called."""


def planes_of_fp8(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    weight_block_size: tuple[int, int] | None = None,
    activation: Activation | None = None,
) -> Planes:
    """The planes of an FP8 linear: `fp8`, `fbgemm_fp8` and `mxfp8` of transformers.

    Args:
        tensors: `weight` e4m3 or e5m2 `[N, K]`, and its scales by one of `SCALE_NAMES`: float, e8m0, or uint8 for
            e8m0. Or 4-bit floats in int8 `[N, K / 2]` with e8m0 scales `[N, K / 32]`.
        n: output features.
        k: input features.
        weight_block_size: rows and columns of a block: `[ceil(N / rows), ceil(K / columns)]` scales, of which the last
            ones belong to smaller blocks. It cannot be told from the scales. None: one scale for all, or for each row.
        activation: how the input is quantized; static: by `activation_scale` or `input_scale`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("FP8", tensors, n, k)
    names = [name for name in SCALE_NAMES if name in tensors]
    source.require(len(names) == 1, f"it has {names or 'none'} of {SCALE_NAMES}; there has to be one")
    if "weight" in tensors and tensors["weight"].dtype in (torch.int8, torch.uint8):
        return mx(source, fp4_codes(source, "weight"), "e2m1", names[0])
    block = None
    if weight_block_size is not None:
        source.require(
            len(weight_block_size) == 2 and min(weight_block_size) > 0, f"no such block: {weight_block_size}"
        )
        block = Block(*weight_block_size)
    return fp8(source, names[0], block, activation)
