"""What belongs to the blocks of one weight: scales, zeros, biases. Out of planes, and laid over the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.bits import unpack
from fxquant.codecs.blocks import Area, spread
from fxquant.codecs.double import Double
from fxquant.codecs.family import Family
from fxquant.codecs.floats import Floats
from fxquant.codecs.integers import Integers
from fxquant.codecs.scales import ScaleFormat, scale_format, unpack_fields
from fxquant.codecs.tables import Tables
from fxquant.scheme import SCALE_TYPES, Scheme


@dataclass(frozen=True)
class Level:
    """One number per block: scales, float zeros or biases."""

    format: ScaleFormat
    stored: Tensor
    """As `format` stores them, not packed; the block grid."""

    def spread(self, scheme: Scheme, n: int, k: int, area: Area) -> Tensor:
        """In float32, to broadcast against an area."""
        return spread(lambda at: self.format.load(self.stored[at], at), scheme.block, n, k, area)


@dataclass(frozen=True)
class Grid:
    """All that belongs to blocks."""

    scheme: Scheme
    scales: Level
    zeros: Tensor | None = None
    """Integer zeros: as codes are, but never packed; in the shape of the scales."""
    offsets: Level | None = None
    """Float zeros or biases, as the scheme's kind of zero says."""

    def zero(self, family: Family, n: int, k: int, area: Area) -> Tensor | None:
        """What is subtracted from codes, float32, to broadcast against an area."""
        zeros = self.zeros
        if zeros is not None:
            return spread(lambda at: family.decode(zeros[at]), self.scheme.block, n, k, area)
        return self._offset("float", n, k, area)

    def bias(self, n: int, k: int, area: Area) -> Tensor | None:
        """What is added to scaled values, float32, to broadcast against an area."""
        return self._offset("bias", n, k, area)

    def _offset(self, zero: str, n: int, k: int, area: Area) -> Tensor | None:
        if self.offsets is None or self.scheme.zero != zero:
            return None
        return self.offsets.spread(self.scheme, n, k, area)


def family_of(scheme: Scheme, device: torch.device) -> Family:
    """What knows how values, scales and codes of the scheme's element belong together."""
    match scheme.spec.kind:
        case "table":
            return Tables(scheme.spec, device)
        case "float":
            return Floats(scheme.spec, device)
        case _:
            return Integers(scheme.spec, scheme.zero)


def grid_of(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int) -> Grid:
    """The grid that planes hold."""
    shape, zeros, spec = scheme.block.grid(n, k), planes.get("zeros"), scheme.spec
    if scheme.double:
        level = Level(Double(planes["scale_scales"], planes["scale_offset"]), planes["scales"])
    else:
        level = _level(planes, scheme, "scales", "scale_scales", shape)
    if scheme.zero == "bias":
        return Grid(scheme, level, offsets=_level(planes, scheme, "biases", "bias_scales", shape))
    if scheme.zero == "float":
        return Grid(scheme, level, offsets=_level(planes, scheme, "zeros", "", shape))
    if zeros is not None:
        zeros = (zeros if spec.dtype is not None else unpack(zeros, spec.bits, shape[-1])).reshape(shape)
    return Grid(scheme, level, zeros)


def _level(planes: Mapping[str, Tensor], scheme: Scheme, name: str, outer: str, shape: tuple[int, ...]) -> Level:
    stored = unpack_fields(planes[name], SCALE_TYPES[scheme.scale], shape[-1])
    return Level(scale_format(scheme, top=planes.get(outer)), stored)
