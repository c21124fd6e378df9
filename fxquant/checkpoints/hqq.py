"""HQQ's own safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.integers import shifted
from fxquant.checkpoints.packing import row_blocks
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div
from fxquant.scheme import Block

PACKINGS = {
    "8bit_u8": (8, torch.uint8),
    "4bit_u8": (4, torch.uint8),
    "2bit_u8": (2, torch.uint8),
    "1bit_u8": (1, torch.uint8),
    "3bit_32": (3, torch.int32),
}


def planes_of_hqq(tensors: Mapping[str, Tensor], n: int, k: int) -> Planes:
    """The planes of an HQQ linear (hqq 0.2.8).

    Codes are stored in blocks of rows of the grouped weight, the first block in the highest bits.

    Args:
        tensors: `W_q`, `scale`, `zero`, and the settings of the layer, tensors as well: `shape`, `axis`, `packing`,
            `group_size` (none: whole rows or columns).
        n: output features.
        k: input features.

    Raises:
        CheckpointError: tensors that are not these, scales that are themselves quantized, or groups that run down
            the rows of the weight (axis 0) in strides, which no scheme has.
    """
    source = Source("HQQ", tensors, n, k)
    shape = source.take("shape", (torch.int64, torch.int32), (2,)).tolist()
    source.require(shape == [n, k], f"its shape is {shape}")
    for name in ("quant_scale", "quant_zero"):
        coded = name in tensors and bool(source.take(name, torch.uint8, (), (1,)).any())
        source.require(not coded, f"its {name} is set: scales in codes cannot be read")
    text = source.take("packing", torch.uint8)
    packing = bytes(text.flatten()[:16].tolist()).decode("ascii", "replace")
    source.require(packing in PACKINGS, f"its packing {packing!r} is none of {', '.join(PACKINGS)}")
    bits, dtype = PACKINGS[packing]
    axis = _integer(source, "axis", 1)
    source.require(axis in (0, 1), f"its axis is {axis}")
    size = _integer(source, "group_size", k if axis else n)
    source.require(size > 0 and n * k % size == 0, f"its group_size is {size}")
    groups = n * k // size
    rows, columns = (groups, size) if axis else (size, groups)
    fields = _fields(source, bits, dtype, rows, columns).view(n, k)
    grid = (groups, 1) if axis else (1, groups)
    scales, zeros = (source.take(name, FLOATS, grid, (groups,)) for name in ("scale", "zero"))
    block = _block(source, axis, size)
    shape_of_grid = block.grid(n, k)
    return shifted(source, fields, bits, scales.view(shape_of_grid), zeros.view(shape_of_grid), block, "float")


def _integer(source: Source, name: str, otherwise: int) -> int:
    if name not in source.tensors:
        return otherwise
    return int(source.take(name, (torch.int32, torch.int64), (), (1,)))


def _fields(source: Source, bits: int, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Codes as uint8 `[rows, columns]`, from integers or from floats with their bytes."""
    packed = source.take("W_q", (dtype, *FLOATS))
    if packed.dtype in FLOATS:
        source.require(
            packed.ndim == 2 and packed.nbytes % (dtype.itemsize * max(len(packed), 1)) == 0, "W_q is no matrix"
        )
        packed = packed.view(dtype)
    per_word = 8 * dtype.itemsize // bits
    expected = (ceil_div(rows, per_word), columns)
    source.require(
        tuple(packed.shape) == expected, f"'W_q' has shape {list(packed.shape)}; it has to be {list(expected)}"
    )
    return row_blocks(packed, bits, highest_first=True)[:rows]


def _block(source: Source, axis: int, size: int) -> Block:
    n, k = source.n, source.k
    if axis == 1:
        return source.block(size) if k % size == 0 else Block(1, size, flat=True)
    if size == n:
        return Block(n, 1)
    raise source.error(
        f"its groups (axis 0, group_size {size}) take every {math.ceil(n / size)}th row of a column",
        "quantize the model with axis=1, or load it with hqq",
    )
