"""How scales are stored: in their own dtype, as small floats, powers of two or integers under a second level.

A format goes between float32 scales and what the grid of blocks holds: one number per block, not packed yet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.bits import pack, unpack
from fxquant.codecs.family import bounded, float_values, look_up
from fxquant.scheme import SCALE_TYPES, Block, Element, Outer, ScaleType, Scheme

Grid = tuple[slice, ...]
"""A part of the grid of blocks; slices have a start and a stop."""


class ScaleFormat(Protocol):
    """Between float32 scales and what is stored of them. `at` says which part of the grid of blocks the scales are."""

    @property
    def signed(self) -> bool:
        """Whether a scale can be negative."""
        ...

    @property
    def coarse(self) -> bool:
        """Whether neighbours are so far apart that a search must look at them."""
        ...

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """Float32 scales as the grid holds them: the nearest there is, or the next larger for powers of two."""
        ...

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the grid in float32."""
        ...

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """What lies `step` places further from zero, or the same where there is nothing more."""
        ...


@dataclass(frozen=True)
class Plain:
    """Scales in their own dtype, with a magnitude from `floor` to `limit`."""

    dtype: torch.dtype
    floor: float
    limit: float
    signed: bool = True
    coarse: bool = False

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """Float32 scales, rounded."""
        magnitudes = scales.abs().clamp_(self.floor, self.limit)
        return torch.where(scales < 0, -magnitudes, magnitudes).to(self.dtype)

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the grid in float32."""
        return stored.to(torch.float32)

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """The next float of the dtype."""
        return torch.nextafter(stored, torch.full_like(stored, math.copysign(math.inf, step)) * stored.sign())


@dataclass(frozen=True)
class SmallFloat:
    """Scales as the bit patterns of a small float."""

    dtype: torch.dtype
    limit: float
    signed: bool = True
    coarse: bool = True

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """Float32 scales, rounded."""
        # Adding 0 leaves one pattern for a block of zeros, whichever sign the largest of them was found to have.
        return scales.clamp(-self.limit, self.limit).add_(0.0).to(self.dtype).view(torch.uint8)

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the grid in float32."""
        return look_up(stored, float_values(self.dtype, stored.device))

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """The next bit pattern of the same sign: magnitudes are in the order of their patterns."""
        top = torch.tensor(self.limit).to(self.dtype).view(torch.uint8).item()
        magnitudes = ((stored & 0x7F).to(torch.int16) + step).clamp_(0, top).to(torch.uint8)
        return magnitudes | (stored & 0x80)


@dataclass(frozen=True)
class Power:
    """Scales as exponents: `2**(code - 127)`, codes 0 to `limit`."""

    limit: int
    signed: bool = False
    coarse: bool = True

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """The smallest power of two that is not less."""
        mantissa, exponent = torch.frexp(scales.abs())
        codes = exponent.to(torch.int32) - (mantissa == 0.5).to(torch.int32) + 127
        return torch.where(mantissa > 0, codes, 0).clamp_(0, self.limit).to(torch.uint8)

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the grid in float32; 255 is nan."""
        return look_up(stored, _powers(stored.device))

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """Twice or half the scale."""
        return (stored.to(torch.int16) + step).clamp_(0, self.limit).to(torch.uint8)


@dataclass(frozen=True)
class Leveled:
    """Scales that a second level multiplies: integers, or small floats."""

    inner: ScaleType
    top: Tensor
    """Float32, the second level's grid."""
    block: Block
    outer: Outer
    coarse: bool = True

    @property
    def signed(self) -> bool:
        """Whether an integer below 0 is among them, or a float with a sign."""
        return self.inner.signed

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """The nearest integer (or float) there is, as a field that is not packed yet."""
        ratio = scales / bounded(self.above(at))
        if self.inner.pattern is not None:
            return _small(self.inner).store(ratio, at)
        field = torch.round((ratio - self.inner.low) / self.inner.step).clamp_(0, (1 << self.inner.bits) - 1)
        return (field + self.inner.low if self.inner.dtype is not None else field).to(self._dtype)

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the grid in float32: the product of both levels."""
        if self.inner.pattern is not None:
            return _small(self.inner).load(stored, at) * self.above(at)
        values = stored.to(torch.float32)
        if self.inner.dtype is None:
            values = values * self.inner.step + self.inner.low
        return values * self.above(at)

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """The next integer (or float) away from zero."""
        if self.inner.pattern is not None:
            return _small(self.inner).neighbour(stored, step)
        shift = self.inner.low if self.inner.dtype is None and self.inner.signed else 0
        values = stored.to(torch.int16) + shift
        moved = torch.where(values < 0, values - step, values + step) - shift
        low = self.inner.low if self.inner.dtype is not None else 0
        return moved.clamp_(low, low + (1 << self.inner.bits) - 1).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.inner.dtype or torch.uint8

    def above(self, at: Grid) -> Tensor:
        """The second-level scales of a part of the grid, one per block."""
        if len(at) == 1:
            return self.top.view(-1)[:1]
        small = (self.block.rows, self.block.columns)
        large = (self.outer.block.rows, self.outer.block.columns)
        values = self.top
        for dim, (part, less, more) in enumerate(zip(at, small, large, strict=True)):
            blocks = torch.arange(part.start, part.stop, device=values.device)
            values = values.index_select(dim, blocks * less // more if more else torch.zeros_like(blocks))
        return values


def scale_format(scheme: Scheme, floor: float = 0.0, top: Tensor | None = None) -> ScaleFormat:
    """The format of a scheme's scales, so bounded that every product of a value and a scale is finite.

    Args:
        scheme: without double quantization.
        floor: no scale of one level is stored with a smaller magnitude.
        top: the second level's scales, where the scheme has one.
    """
    kind = SCALE_TYPES[scheme.scale]
    if scheme.outer is not None:
        assert top is not None
        return Leveled(kind, top.to(torch.float32), scheme.block, scheme.outer)
    if kind.kind == "power":
        return Power(int(min(254, 254 - math.ceil(math.log2(_span(scheme.spec))))))
    if kind.pattern is not None:
        return _small(kind)
    assert kind.dtype is not None
    info, span = torch.finfo(kind.dtype), _span(scheme.spec)
    limit = min(info.max, torch.finfo(torch.bfloat16).max / span if span > 1 else math.inf)
    return Plain(kind.dtype, max(floor, info.smallest_normal * info.eps) if floor else 0.0, limit)


def _span(spec: Element) -> float:
    """A power of two that no value exceeds."""
    return 1 << spec.bits if spec.kind == "int" else 2.0 ** math.ceil(math.log2(spec.bound))


def _small(kind: ScaleType) -> SmallFloat:
    assert kind.pattern is not None
    return SmallFloat(kind.pattern, torch.finfo(kind.pattern).max)


def pack_fields(fields: Tensor, kind: ScaleType) -> Tensor:
    """The grid as its plane: rows of small fields packed, all else as it is."""
    return fields if kind.dtype is not None else pack(fields, kind.bits)


def unpack_fields(plane: Tensor, kind: ScaleType, columns: int) -> Tensor:
    """The plane as its grid: the inverse of `pack_fields`."""
    return plane if kind.dtype is not None else unpack(plane, kind.bits, columns)


@functools.lru_cache(maxsize=8)
def _powers(device: torch.device) -> Tensor:
    codes = torch.arange(255, dtype=torch.int32)
    powers = torch.ldexp(torch.ones(255), codes - 127)
    return torch.cat((powers, torch.full((1,), math.nan))).to(device)
