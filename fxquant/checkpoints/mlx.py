"""MLX: affine and microscaling modes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import fp4_codes, mx, nvfp4
from fxquant.checkpoints.integers import shifted
from fxquant.checkpoints.packing import octets, stream
from fxquant.checkpoints.source import FLOATS, Planes, Source

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
_WORDS = (torch.uint32, torch.int32)


def planes_of_mlx(
    tensors: Mapping[str, Tensor], n: int, k: int, *, bits: int = 4, group_size: int = 64, mode: str = "affine"
) -> Planes:
    """The planes of a linear of MLX (0.32), or of transformers' `metal`.

    Args:
        tensors: `weight` uint32 `[N, K * bits / 32]`, a bit stream along K; `scales` `[N, G]`: float, or uint8 in the
            other modes; of affine, `biases` (`qbiases`) `[N, G]`: `code * scale + bias`.
        n: output features.
        k: input features.
        bits: of an affine code: 2, 3, 4, 5, 6 or 8.
        group_size: columns that share a scale, of affine.
        mode: one of `MODES`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"MLX {mode}", tensors, n, k)
    source.require(mode in MODES, f"the mode is none of {', '.join(MODES)}")
    if mode != "affine":
        bits = 8 if mode == "mxfp8" else 4
    source.require(bits in (2, 3, 4, 5, 6, 8), f"codes have 2, 3, 4, 5, 6 or 8 bits, not {bits}")
    source.require(k * bits % 32 == 0, "rows are no whole words")
    words = source.take("weight", _WORDS, (n, k * bits // 32))
    if mode == "affine":
        group = source.group(group_size)
        grid = (n, k // group)
        name = "qbiases" if "qbiases" in tensors else "biases"
        scales, biases = source.take("scales", FLOATS, grid), source.take(name, FLOATS, grid)
        return shifted(source, stream(words, bits, k), bits, scales, biases, source.block(group))
    inner = Source(source.format, {**tensors, "weight": octets(words)}, n, k)
    if mode == "mxfp8":
        return mx(inner, inner.take("weight", torch.uint8, (n, k)), "fp8", "scales")
    codes = fp4_codes(inner, "weight")
    return mx(inner, codes, "e2m1", "scales") if mode == "mxfp4" else nvfp4(inner, codes, "scales", None)
