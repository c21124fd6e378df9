"""Small floats with scales: what the FP8, MX and NVFP4 formats of all producers come to."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.checkpoints.source import E4M3, E5M2, E8M0, FLOATS, Planes, Source
from fxquant.scheme import ROW, TENSOR, Activation, Block, Outer

FP8 = {E4M3: "fp8", E5M2: "fp8e5m2"}
MX_GROUP, NVFP4_GROUP = 32, 16
_SCALES = {**FLOATS, E4M3: "e4m3", E8M0: "e8m0", torch.uint8: "e8m0"}


def scaled(
    source: Source,
    codes: Tensor,
    element: str,
    scales: Tensor,
    block: Block | None = None,
    activation: Activation | None = None,
) -> Planes:
    """Planes of `float(code) * scale`, and the like for int8.

    Args:
        source: whose weight it is.
        codes: the plane of codes.
        element: what they mean; signed.
        scales: float, or uint8 for powers of two; one number for each block.
        block: which weights share a scale; None: all, or those of a row, as the number of scales says.
        activation: how the input is quantized.

    Raises:
        CheckpointError: another number of scales.
    """
    if block is None:
        source.require(tuple(scales.shape) in ((), (1,), (1, 1), (source.n,), (source.n, 1)), _neither(scales))
        block = TENSOR if scales.numel() == 1 else ROW
    grid = block.grid(source.n, source.k)
    flat = scales.numel() == 1 and grid == (1, 1)
    source.require(
        flat or tuple(scales.shape) in (grid, (grid[0],) if grid[1] == 1 else grid), _unlike(scales, block, grid)
    )
    name, plane = _SCALES[scales.dtype], scales.reshape(grid)
    plane = plane if scales.dtype in FLOATS else plane.view(torch.uint8)
    scheme = source.scheme(element=element, block=block, scale=name)
    return source.finish(scheme, {"codes": codes, "scales": plane}, activation)


def _neither(scales: Tensor) -> str:
    return f"it has scales of shape {list(scales.shape)}, neither one for all nor one for each row"


def _unlike(scales: Tensor, block: Block, grid: tuple[int, ...]) -> str:
    return f"it has scales of shape {list(scales.shape)}; blocks of {block} have {list(grid)}"


def fp8(source: Source, scale_name: str, block: Block | None = None, activation: Activation | None = None) -> Planes:
    """Planes of an 8-bit float `weight` with float or e8m0 scales."""
    weight = source.take("weight", FP8, (source.n, source.k))
    scales = source.take(scale_name, (*FLOATS, E8M0, torch.uint8))
    return scaled(source, weight.view(torch.uint8), FP8[weight.dtype], scales, block, activation)


def fp4_codes(source: Source, name: str) -> Tensor:
    """Packed 4-bit floats, uint8 `[N, K / 2]`, the low half first: the plane of codes as it is."""
    source.require(source.k % 2 == 0, "K is odd")
    return source.take(name, (torch.uint8, torch.int8), (source.n, source.k // 2)).view(torch.uint8)


def mx(source: Source, codes: Tensor, element: str, scale_name: str) -> Planes:
    """Planes of OCP Microscaling v1.0: groups of 32 with the exponent of a power of two."""
    source.group(MX_GROUP)
    scales = source.take(scale_name, (torch.uint8, E8M0), (source.n, source.k // MX_GROUP))
    return scaled(source, codes, element, scales, Block(1, MX_GROUP))


def nvfp4(source: Source, codes: Tensor, scale_name: str, outer: Tensor | None) -> Planes:
    """Planes of NVFP4: groups of 16 with an e4m3 scale, all times `outer`, float32 `[1]`, where there is one."""
    source.group(NVFP4_GROUP)
    scales = source.take(scale_name, (E4M3, torch.uint8), (source.n, source.k // NVFP4_GROUP)).view(torch.uint8)
    block = Block(1, NVFP4_GROUP)
    planes = {"codes": codes, "scales": scales}
    if outer is not None:
        planes["scale_scales"] = outer.view(1, 1)
    second = None if outer is None else Outer("fp32", TENSOR)
    scheme = source.scheme(element="e2m1", block=block, scale="e4m3", outer=second)
    return source.finish(scheme, planes)
