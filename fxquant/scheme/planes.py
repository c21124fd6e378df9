"""The planes of a weight under a scheme: which there are, their shapes and dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxquant.scheme.blocks import Block
from fxquant.scheme.elements import Element
from fxquant.scheme.scale_types import SCALE_TYPES

if TYPE_CHECKING:
    from fxquant.scheme.scheme import Scheme

DOUBLE_QUANT_BLOCK = 256
"""Scales that share one second-level scale under double quantization (QLoRA, section 3)."""


@dataclass(frozen=True)
class PlaneSpec:
    """Shape and dtype of one plane."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the plane."""
        return math.prod(self.shape) * self.dtype.itemsize


def planes_of(scheme: Scheme, n: int, k: int) -> dict[str, PlaneSpec]:
    """The planes of an `[n, k]` weight, in the order in which ops take them; see `Scheme.planes`."""
    grid, fp32 = scheme.block.grid(n, k), torch.float32
    specs = _codes(scheme, n, k)
    if scheme.double:
        specs["scales"] = PlaneSpec(grid, torch.uint8)
        specs["scale_scales"] = PlaneSpec((math.ceil(grid[0] / DOUBLE_QUANT_BLOCK),), fp32)
        specs["scale_offset"] = PlaneSpec((1,), fp32)
    else:
        specs |= _leveled(scheme, "scales", "scale_scales", n, k)
    if scheme.zero == "int":
        specs["zeros"] = _coded(scheme.spec, *(grid if len(grid) == 2 else (1, *grid)))
    elif scheme.zero == "float":
        specs["zeros"] = _leveled(scheme, "zeros", "", n, k)["zeros"]
    elif scheme.zero == "bias":
        specs |= _leveled(scheme, "biases", "bias_scales", n, k)
    if "perm" in scheme.columns:
        specs["perm"] = PlaneSpec((k,), torch.int32)
    if "scale" in scheme.columns:
        specs["column_scales"] = PlaneSpec((k,), fp32)
    if "bias" in scheme.columns:
        specs["column_biases"] = PlaneSpec((k,), fp32)
    if scheme.activation and scheme.activation.static:
        specs["input_scale"] = PlaneSpec((1,), fp32)
    return specs


def _codes(scheme: Scheme, n: int, k: int) -> dict[str, PlaneSpec]:
    vectors = scheme.spec.vectors
    if vectors is None:
        return {"codes": _coded(scheme.spec, n, k)}
    specs = {"codes": _coded(scheme.spec, math.ceil(n / vectors.rows), math.ceil(k / vectors.columns))}
    if vectors.signs:
        specs["signs"] = PlaneSpec((n, math.ceil(k / 8 * vectors.signs / 8)), torch.uint8)
    dtype = SCALE_TYPES[scheme.outer.dtype if scheme.outer else scheme.scale].dtype
    assert dtype is not None
    for i, bits in enumerate(vectors.books):
        specs[f"codebook{i}"] = PlaneSpec((vectors.groups, 1 << bits, vectors.rows, vectors.columns), dtype)
    return specs


def _leveled(scheme: Scheme, name: str, outer_name: str, n: int, k: int) -> dict[str, PlaneSpec]:
    """A plane of scales or the like, and that of its second level where there is one."""
    specs = {name: scale_plane(scheme, scheme.block, n, k)}
    if scheme.outer is not None:
        dtype = SCALE_TYPES[scheme.outer.dtype].dtype
        assert dtype is not None
        specs[outer_name] = PlaneSpec(scheme.outer.block.grid(n, k), dtype)
    return specs


def scale_plane(scheme: Scheme, block: Block, n: int, k: int) -> PlaneSpec:
    """The plane of the first-level scales; packed ones fill up each row of the grid to whole bytes."""
    kind, grid = SCALE_TYPES[scheme.scale], block.grid(n, k)
    if kind.dtype is not None:
        return PlaneSpec(grid, kind.dtype)
    return PlaneSpec((*grid[:-1], math.ceil(grid[-1] * kind.bits / 8)), torch.uint8)


def _coded(spec: Element, rows: int, columns: int) -> PlaneSpec:
    if spec.dtype is not None:
        return PlaneSpec((rows, columns), spec.dtype)
    return PlaneSpec((rows, spec.packed(columns)), torch.uint8)
