"""How compressed-tensors holds the weights of a scheme: its settings for one linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from fxquant.checkpoints.floats import MX_GROUP
from fxquant.checkpoints.integer_parts import held_bits, integer_obstacles
from fxquant.checkpoints.target import EXACT_IN_FP32, group_of
from fxquant.scheme import TENSOR, Block, Scheme

BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Layout:
    """The settings that a group of `config_groups` has for weights, and the format of its tensors."""

    format: str
    type: Literal["int", "float"]
    bits: int
    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"]
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale_dtype: str | None = None


_E8M0, _E4M3 = "torch.uint8", "torch.float8_e4m3fn"
_WHOLE: Mapping[str, Layout] = MappingProxyType(
    {
        "mxfp4": Layout("mxfp4-pack-quantized", "float", 4, "group", MX_GROUP, scale_dtype=_E8M0),
        "mxfp6": Layout("mxfp6-pack-quantized", "float", 6, "group", MX_GROUP, scale_dtype=_E8M0),
        "mxfp8": Layout("mxfp8-quantized", "float", 8, "group", MX_GROUP, scale_dtype=_E8M0),
        "nvfp4": Layout("nvfp4-pack-quantized", "float", 4, "tensor_group", 16, scale_dtype=_E4M3),
    }
)
"""Schemes that have a format of their own, by name."""


def compressed_tensors_obstacles(scheme: Scheme, n: int, k: int) -> list[str]:
    """What keeps compressed-tensors from holding a weight exactly: what it has instead.

    nvfp4 counts as exact, though its second-level scale is stored as its reciprocal, see
    `tensors_of_compressed_tensors`.
    """
    activation = scheme.activation
    if _whole(scheme) is not None:
        return []
    found = [f"no quantized inputs for {scheme.weight_only}"] if _whole(scheme.weight_only) else []
    if scheme.element == "fp8":
        found += _fp8_obstacles(scheme, n, k)
    else:
        # Within one group the order of columns is free. Files with groups of any columns are refused since 0.20.
        found += integer_obstacles(scheme, n, k, BITS, perm=activation is None and group_of(scheme, n, k) == k)
    if scheme.scale not in EXACT_IN_FP32:
        found.append(f"scales that are floats, not {scheme.scale}")
    if activation is not None and activation.threshold:
        found.append("no outliers of quantized inputs")
    return found


def _fp8_obstacles(scheme: Scheme, n: int, k: int) -> list[str]:
    found = []
    if scheme.outer is not None:
        found.append("one level of scales")
    if not _is_block(scheme.block) and group_of(scheme, n, k) is None:
        found.append(f"groups that are equal parts of a row of K={k}, not {scheme.block}")
    if scheme.columns:
        found.append("no columns that are permuted, scaled or shifted")
    return found


def layout_of(scheme: Scheme, n: int, k: int) -> Layout:
    """The settings for a weight whose scheme `compressed_tensors_obstacles` has nothing against.

    Formats are those that compressed-tensors 0.20 infers from the other settings.
    """
    whole = _whole(scheme)
    if whole is not None:
        return whole
    block, inputs = scheme.block, scheme.activation is not None
    if scheme.element == "fp8":
        name = "float-quantized" if inputs else "naive-quantized"
        if _is_block(block):
            return Layout(name, "float", 8, "block", block=(block.rows, block.columns))
        return Layout(name, "float", 8, *_strategy(scheme, n, k))
    name, bits = "int-quantized" if inputs else "pack-quantized", held_bits(scheme.spec, BITS)
    strategy, size = _strategy(scheme, n, k)
    return Layout(name, "int", bits, strategy, size, symmetric=scheme.zero == "none")


def _strategy(scheme: Scheme, n: int, k: int) -> tuple[Literal["tensor", "channel", "group"], int | None]:
    if scheme.block == TENSOR and scheme.zero == "none":
        return "tensor", None
    group = group_of(scheme, n, k)
    return ("channel", None) if group == k and scheme.block.columns != k else ("group", group)


def _whole(scheme: Scheme) -> Layout | None:
    return next((layout for name, layout in _WHOLE.items() if Scheme.parse(name) == scheme), None)


def _is_block(block: Block) -> bool:
    return not block.flat and block.rows > 1 and block.columns > 0
