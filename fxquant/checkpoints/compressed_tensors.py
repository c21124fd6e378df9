"""compressed-tensors, which llm-compressor writes: packed integers, plain int8 and FP8, and the 4- to 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.checkpoints.floats import FP8, fp4_codes, fp8, mx, nvfp4
from fxquant.checkpoints.integers import affine, fields_of, order
from fxquant.checkpoints.packing import padded, stream
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div
from fxquant.scheme import Activation, Block


def planes_of_compressed_tensors(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    format: str,
    bits: int = 4,
    group_size: int | None = None,
    block_structure: tuple[int, int] | None = None,
    activation: Activation | None = None,
) -> Planes:
    """The planes of a linear that compressed-tensors 0.9 to 0.20 stored.

    Args:
        tensors: as the format has them. Integers are `code + 2**(bits - 1)` in words of 32 bits along K (zero points:
            along N), as a bit stream or, below version 0.18, in whole fields per word. The shape of `weight_packed`
            tells; where K is so small (below 160) that it does not, a bit stream it is.
        n: output features.
        k: input features.
        format: a key of `FORMATS`.
        bits: of an integer code.
        group_size: columns that share a scale; None: the scales tell between one for all and one for each row.
        block_structure: rows and columns of a block, where the strategy is `block`.
        activation: how the input is quantized; static: by `input_scale`.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"compressed-tensors {format}", tensors, n, k)
    source.require(format in FORMATS, f"the format is none of {', '.join(FORMATS)}")
    source.require(1 <= bits <= 8, f"integers have 1 to 8 bits, not {bits}")
    block = None
    if block_structure is not None:
        source.require(len(block_structure) == 2 and min(block_structure) > 0, f"no such block: {block_structure}")
        block = Block(*block_structure)
    elif group_size is not None:
        block = source.block(source.group(group_size))
    return FORMATS[format](source, bits, block, activation)


def _packed(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    n, k = source.n, source.k
    if "weight_shape" in source.tensors:
        shape = source.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        source.require(shape == [n, k], f"its weight_shape is {shape}")
    dense, whole = ceil_div(k * bits, 32), ceil_div(k, 32 // bits)
    words = source.take("weight_packed", torch.int32, (n, dense), (n, whole))
    unpack = stream if words.shape[1] == dense else padded
    fields = unpack(words, bits, k)
    scales, block = _grid(source, block)
    zeros = None
    if "weight_zero_point" in source.tensors:
        zeros = _zeros(source, bits, block, unpack)
    perm = None
    if "weight_g_idx" in source.tensors:
        g_idx = source.take("weight_g_idx", (torch.int32, torch.int64), (k,))
        perm = order(source, g_idx, block.columns or k)
        fields = fields if perm is None else fields.index_select(1, perm)
    return affine(source, fields, bits, scales, zeros, block, perm, activation)


def _plain(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    weight = source.take("weight", (torch.int8, *FP8), (source.n, source.k))
    if weight.dtype in FP8:
        return fp8(source, "weight_scale", block, activation)
    scales, block = _grid(source, block)
    zeros = None
    if "weight_zero_point" in source.tensors:
        grid = tuple(scales.shape)
        shapes = (grid, (1,), ()) if grid == (1, 1) else (grid, grid[:1]) if grid[1] == 1 else (grid,)
        zeros = source.take("weight_zero_point", (torch.int8, torch.int32, torch.int64), *shapes)
        source.require(bool((zeros == zeros.to(torch.int8)).all()), "it has zero points outside of int8")
        zeros = fields_of(source, "weight_zero_point", zeros.to(torch.int8).view(scales.shape), bits)
    return affine(source, fields_of(source, "weight", weight, bits), bits, scales, zeros, block, None, activation)


def _nvfp4(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    # The file has the number that weights were multiplied with.
    return nvfp4(
        source, fp4_codes(source, "weight_packed"), "weight_scale", source.scalar("weight_global_scale").reciprocal()
    )


def _mxfp4(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    return mx(source, fp4_codes(source, "weight_packed"), "e2m1", "weight_scale")


def _mxfp6(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    source.require(source.k % 4 == 0, "K is no multiple of 4")
    codes = source.take("weight_packed", torch.uint8, (source.n, source.k // 4 * 3))
    return mx(source, codes, "e2m3", "weight_scale")


def _mxfp8(source: Source, bits: int, block: Block | None, activation: Activation | None) -> Planes:
    weight = source.take("weight", FP8, (source.n, source.k))
    return mx(source, weight.view(torch.uint8), FP8[weight.dtype], "weight_scale")


FORMATS: Mapping[str, Callable[[Source, int, Block | None, Activation | None], Planes]] = MappingProxyType(
    {
        "pack-quantized": _packed,
        "int-quantized": _plain,
        "float-quantized": _plain,
        "naive-quantized": _plain,
        "nvfp4-pack-quantized": _nvfp4,
        "mxfp4-pack-quantized": _mxfp4,
        "mxfp6-pack-quantized": _mxfp6,
        "mxfp8-quantized": _mxfp8,
    }
)
"""The formats that can be read, by the name that a config gives them."""


def _zeros(source: Source, bits: int, block: Block, unpack: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    n, (_, groups) = source.n, block.grid(source.n, source.k)
    found = source.take("weight_zero_point", (torch.int32, torch.int8))
    if found.dtype == torch.int8:
        zeros = source.take("weight_zero_point", torch.int8, (n, groups))
        return fields_of(source, "weight_zero_point", zeros, bits)
    count = ceil_div(n * bits, 32) if unpack is stream else ceil_div(n, 32 // bits)
    words = source.take("weight_zero_point", torch.int32, (count, groups))
    return unpack(words.t(), bits, n).t()


def _grid(source: Source, block: Block | None) -> tuple[Tensor, Block]:
    """Scales as a grid of blocks, and which blocks."""
    n, k = source.n, source.k
    if block is None:
        scales = source.take("weight_scale", FLOATS, (), (1,), (1, 1), (n,), (n, 1))
        block = Block(0, 0) if scales.numel() == 1 else Block(1, 0)
        return scales.view(block.grid(n, k)), block
    grid = block.grid(n, k)
    shapes = (grid, (n,)) if grid == (n, 1) else (grid,)
    return source.take("weight_scale", FLOATS, *shapes).view(grid), block
