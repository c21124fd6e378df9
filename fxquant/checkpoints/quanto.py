"""optimum-quanto."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.floats import FP8, scaled
from fxquant.checkpoints.integers import affine, shifted
from fxquant.checkpoints.packing import row_blocks
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div

QTYPES = {"qint8": 8, "qfloat8": 8, "qfloat8_e4m3fn": 8, "qfloat8_e5m2": 8, "qint4": 4, "qint2": 2}


def planes_of_quanto(tensors: Mapping[str, Tensor], n: int, k: int, *, qtype: str) -> Planes:
    """The planes of a linear of optimum-quanto (0.2.7), quantized along the first axis.

    Args:
        tensors: of 8 bits, `weight._data` `[N, K]` and `weight._scale` `[N, 1]` (or one). Of 4 and 2 bits,
            `weight._data._data` uint8, `[G * N, group]` in blocks of rows, the first in the lowest bits, with
            `weight._scale` and `weight._shift` `[G * N, 1]`: `code * scale - shift`, or `(code - shift) * scale` where
            shifts are integers.
        n: output features.
        k: input features.
        qtype: a key of `QTYPES`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"Quanto {qtype}", tensors, n, k)
    source.require(qtype in QTYPES, f"the type is none of {', '.join(QTYPES)}")
    bits = QTYPES[qtype]
    scales = source.take("weight._scale", FLOATS)
    if bits == 8:
        codes = source.take("weight._data", torch.int8 if qtype == "qint8" else FP8, (n, k))
        element = FP8.get(codes.dtype, "int8")
        return scaled(source, codes if element == "int8" else codes.view(torch.uint8), element, scales)
    groups = scales.numel()
    source.require(groups > 0 and groups % n == 0 and k % (groups // n) == 0, f"it has {groups} scales")
    group = k * n // groups
    packed = source.take("weight._data._data", torch.uint8, (ceil_div(groups * bits, 8), group))
    fields = row_blocks(packed, bits)[:groups].view(n, k)
    grid = (n, groups // n)
    shifts = source.take("weight._shift", (*FLOATS, torch.int8, torch.uint8), tuple(scales.shape)).view(grid)
    block = source.block(group)
    if shifts.dtype in FLOATS:
        return shifted(source, fields, bits, scales.view(grid), -shifts, block)
    source.require(
        bool(((shifts >= 0) & (shifts < 1 << bits)).all()), "it has shifts outside of the range of its codes"
    )
    return affine(source, fields, bits, scales.view(grid), shifts.to(torch.uint8), block)
