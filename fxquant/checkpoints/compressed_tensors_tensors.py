"""What compressed-tensors stores of a linear, out of planes: the inverse of `compressed_tensors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.checkpoints.compressed_tensors_layouts import Layout, compressed_tensors_obstacles, layout_of
from fxquant.checkpoints.integer_parts import of_fields, scales_and_zeros
from fxquant.checkpoints.packing import words
from fxquant.checkpoints.source import E4M3
from fxquant.checkpoints.target import Target, Written, argument_of, natural
from fxquant.scheme import Scheme


def tensors_of_compressed_tensors(scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int) -> Written:
    """The tensors of a linear as compressed-tensors 0.20 stores them: the inverse of `planes_of_compressed_tensors`.

    A permutation of the columns of one group is undone, blocks of several rows of integers stand in groups of their
    own, and scales that are powers of two in float32: the same weights. NVFP4's second-level scale is stored as its
    reciprocal; where no float32 gives it back, the nearest one is written.

    Args:
        scheme: one that `compressed_tensors_obstacles` has nothing against; `layout_of` tells the settings.
        planes: as `Scheme.planes` has them; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.

    Returns:
        The tensors of the format, see `planes_of_compressed_tensors`.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    target = Target("compressed-tensors", scheme, planes, n, k)
    target.check(compressed_tensors_obstacles)
    layout = layout_of(scheme, n, k)
    written = _WRITTEN[layout.format](target, layout)
    if "input_scale" in planes:
        written["input_scale"] = planes["input_scale"]
    return written


def _packed(target: Target, layout: Layout) -> Written:
    (scales, zeros), device = scales_and_zeros(target, layout.bits), target.planes["codes"].device
    written = {
        "weight_packed": of_fields(target, layout.bits, lambda rows: words(natural(target, rows), layout.bits)),
        "weight_scale": _by_strategy(target, scales, layout),
        "weight_shape": torch.tensor([target.n, target.k], dtype=torch.int64, device=device),
    }
    if not layout.symmetric:
        written["weight_zero_point"] = words(zeros.t(), layout.bits).t().contiguous()
    return written


def _integers(target: Target, layout: Layout) -> Written:
    (scales, zeros), half = scales_and_zeros(target, layout.bits), 1 << (layout.bits - 1)
    written = {
        "weight": of_fields(target, layout.bits, lambda rows: (rows.to(torch.int16) - half).to(torch.int8)),
        "weight_scale": _by_strategy(target, scales, layout),
    }
    if not layout.symmetric:
        written["weight_zero_point"] = (zeros.to(torch.int16) - half).to(torch.int8)
    return written


def _floats(target: Target, layout: Layout) -> Written:
    codes = target.planes["codes"].view(E4M3)
    if layout.block is None:
        return {"weight": codes, "weight_scale": _by_strategy(target, target.scales(), layout)}
    return {"weight": codes, "weight_scale": target.float_scales()}


def _mx(target: Target, layout: Layout) -> Written:
    return {"weight_packed": target.planes["codes"], "weight_scale": target.planes["scales"]}


def _mxfp8(target: Target, layout: Layout) -> Written:
    return {"weight": target.planes["codes"].view(E4M3), "weight_scale": target.planes["scales"]}


def _nvfp4(target: Target, layout: Layout) -> Written:
    outer = target.planes["scale_scales"].view(1)
    return {
        "weight_packed": target.planes["codes"],
        "weight_scale": target.planes["scales"].view(E4M3),
        "weight_global_scale": argument_of(outer, torch.reciprocal, outer.reciprocal()),
    }


_WRITTEN: Mapping[str, Callable[[Target, Layout], Written]] = MappingProxyType(
    {
        "pack-quantized": _packed,
        "int-quantized": _integers,
        "float-quantized": _floats,
        "naive-quantized": _floats,
        "mxfp4-pack-quantized": _mx,
        "mxfp6-pack-quantized": _mx,
        "mxfp8-quantized": _mxfp8,
        "nvfp4-pack-quantized": _nvfp4,
    }
)


def _by_strategy(target: Target, scales: Tensor, layout: Layout) -> Tensor:
    """Scales `[N, G]` in the shape that the strategy has."""
    return target.float_scales().view(1) if layout.strategy == "tensor" else scales.contiguous()
