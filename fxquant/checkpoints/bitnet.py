"""BitNet b1.58 as transformers packs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack
from fxquant.checkpoints.packing import row_blocks
from fxquant.checkpoints.source import FLOATS, Planes, Source
from fxquant.scheme import TENSOR, Activation

LINEAR_CLASSES = ("bitlinear", "autobitlinear")


def planes_of_bitnet(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    linear_class: str = "bitlinear",
    activation: Activation | None = None,
) -> Planes:
    """The planes of a ternary linear (arXiv 2402.17764, as transformers packs it).

    Args:
        tensors: `weight` uint8 `[N / 4, K]`, codes plus one in four blocks of rows, the first in the lowest bits;
            `weight_scale`, one.
        n: output features.
        k: input features.
        linear_class: `bitlinear` divides by the scale, `autobitlinear` multiplies.
        activation: how the input is quantized; BitNet: `Activation("int8")`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"BitNet {linear_class}", tensors, n, k)
    source.require(linear_class in LINEAR_CLASSES, f"the linear_class is none of {', '.join(LINEAR_CLASSES)}")
    source.require(n % 4 == 0, "N is no multiple of 4")
    fields = row_blocks(source.take("weight", torch.uint8, (n // 4, k)), 2)
    source.require(bool((fields < 3).all()), "'weight' has codes that are none of -1, 0 and 1")
    scale = source.take("weight_scale", FLOATS, (), (1,)).view(1, 1)
    if linear_class == "bitlinear":
        scale = scale.to(torch.float32).reciprocal()
    scheme = source.scheme(element="ternary", block=TENSOR, scale=FLOATS[scale.dtype])
    return source.finish(scheme, {"codes": pack(fields, 2), "scales": scale}, activation)
