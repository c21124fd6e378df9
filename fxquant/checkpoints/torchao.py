"""torchao's safetensors, by the class of the tensor that was flattened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.checkpoints.floats import FP8, fp4_codes, mx, nvfp4, scaled
from fxquant.checkpoints.integers import affine, fields_of
from fxquant.checkpoints.packing import awq, plane_of
from fxquant.checkpoints.source import FLOATS, Planes, Source, in_one_dtype
from fxquant.scheme import ROW, TENSOR, Activation, Block

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def planes_of_torchao(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    kind: str,
    block_size: tuple[int, int],
    bits: int = 8,
    activation: Activation | None = None,
) -> Planes:
    """The planes of a linear that torchao (0.18) saved.

    Args:
        tensors: `_weight_qdata`, `_weight_scale` and so on, as the metadata of the file name them.
        n: output features.
        k: input features.
        kind: the class, a key of `KINDS`.
        block_size: rows and columns that share a scale, by the attributes of the tensor.
        bits: of an integer code in int8, by its `target_dtype`.
        activation: how the input is quantized.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source(f"torchao {kind}", tensors, n, k)
    source.require(kind in KINDS, f"the class is none of {', '.join(KINDS)}")
    source.require(1 <= bits <= 8, f"integers have 1 to 8 bits, not {bits}")
    rows, columns = block_size
    source.require(rows in (1, n) or kind == "Float8Tensor", f"no such blocks of integers: {list(block_size)}")
    whole = (rows, columns) == (n, k)
    block = TENSOR if whole else ROW if (rows, columns) == (1, k) else Block(rows, columns)
    return KINDS[kind](source, block, bits, activation)


def _integers(source: Source, block: Block, bits: int, activation: Activation | None) -> Planes:
    n, k = source.n, source.k
    grid = block.grid(n, k)
    codes = source.take("_weight_qdata", torch.int8, (n, k))
    shapes = (grid, (n,)) if grid == (n, 1) else (grid,)
    scales = source.take("_weight_scale", FLOATS, *shapes).view(grid)
    zeros = None
    if "_weight_zero_point" in source.tensors:
        stored = source.take("_weight_zero_point", (*_INTEGERS, *FLOATS), *shapes)
        source.require(bool((stored == stored.to(torch.int8)).all()), "it has zero points that are no int8")
        zeros = fields_of(source, "_weight_zero_point", stored.to(torch.int8).view(grid), bits)
    fields = fields_of(source, "_weight_qdata", codes, bits)
    return affine(source, fields, bits, scales, zeros, block, None, activation)


def _float8(source: Source, block: Block, bits: int, activation: Activation | None) -> Planes:
    codes = source.take("_weight_qdata", FP8, (source.n, source.k))
    scales = source.take("_weight_scale", FLOATS)
    return scaled(source, codes.view(torch.uint8), FP8[codes.dtype], scales, block, activation)


def _nvfp4(source: Source, block: Block, bits: int, activation: Activation | None) -> Planes:
    name = "_weight_per_tensor_scale"
    outer = source.scalar(name) if name in source.tensors else None
    return nvfp4(source, fp4_codes(source, "_weight_qdata"), "_weight_scale", outer)


def _mx(source: Source, block: Block, bits: int, activation: Activation | None) -> Planes:
    data = source.take("_weight_qdata", (torch.uint8, *FP8))
    if data.dtype == torch.uint8:
        return mx(source, fp4_codes(source, "_weight_qdata"), "e2m1", "_weight_scale")
    codes = source.take("_weight_qdata", FP8, (source.n, source.k)).view(torch.uint8)
    return mx(source, codes, FP8[data.dtype], "_weight_scale")


def _tinygemm(source: Source, block: Block, bits: int, activation: Activation | None) -> Planes:
    """`(field - 8) * scale + zero`, N filled up to a multiple of 8 and K of 1024."""
    n, k = source.n, source.k
    group = source.group(block.columns or k)
    words = source.take("_weight_qdata", torch.int32)
    both = source.take("_weight_scale_and_zero", FLOATS)
    whole = words.ndim == 4 and words.shape[2] == 32 and words.shape[3] in (1, 2, 4)
    source.require(
        whole, f"'_weight_qdata' has shape {list(words.shape)}; it has to be [N / 8, K / 128, 32, 4] or the like"
    )
    rows, columns = 8 * words.shape[0], 32 * words.shape[1] * words.shape[3]
    source.require(rows >= n and columns >= k, f"'_weight_qdata' has codes for {rows} x {columns} weights")
    fits = both.ndim == 3 and both.shape[0] >= k // group and both.shape[1] >= n and both.shape[2] == 2
    source.require(fits, f"'_weight_scale_and_zero' has shape {list(both.shape)}; it has to be [K / {group}, N, 2]")
    fields = _tiles(words)[:n, :k]
    scale, (scales, biases) = in_one_dtype(*(both[: k // group, :n, i].t() for i in range(2)))
    scheme = source.scheme(element="int4", block=source.block(group), scale=scale, zero="bias")
    planes = {"codes": plane_of(fields, 4, True), "scales": scales, "biases": biases}
    return source.finish(scheme, planes)


def _tiles(words: Tensor) -> Tensor:
    """Tiles of 8 x (16 * inner) codes, each in the order of the fragments of m16n8k16: uint8 `[rows, columns]`."""
    down, across, _, inner = words.shape
    parts = awq(words).view(down, across, 8, 4, inner, 2, 2, 2).permute(0, 2, 1, 4, 5, 6, 3, 7)
    return parts.reshape(down * 8, -1)


KINDS: Mapping[str, Callable[[Source, Block, int, Activation | None], Planes]] = MappingProxyType(
    {
        "Int8Tensor": _integers,
        "IntxUnpackedToInt8Tensor": _integers,
        "Float8Tensor": _float8,
        "NVFP4Tensor": _nvfp4,
        "MXTensor": _mx,
        "Int4TilePackedTo4dTensor": _tinygemm,
    }
)
"""The classes that can be read."""
