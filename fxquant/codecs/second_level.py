"""The second level of scales: which blocks are under one of them, and what it is best set to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.codecs.family import reciprocal
from fxquant.codecs.scales import Leveled, Plain
from fxquant.scheme import SCALE_TYPES, ScaleType, Scheme

# Where the largest scale of a group of blocks lands among the codes, as a multiple of the largest code. Up to 1 every
# scale is within reach; beyond, the largest are clipped, which pays where few and flat blocks have them.
_INTEGER_REACH = (0.8, 1.12, 17)
# Small floats have the same relative steps everywhere: this moves a group's scales against them.
_FLOAT_REACH = (0.53, 1.0, 8)


@dataclass(frozen=True)
class Groups:
    """Which blocks of a grid, `[R, C]` or flat `[R]`, share a second-level number, `[r, c]`."""

    rows: int
    columns: int
    down: int
    """Rows of the grid in a group."""
    across: int

    def gather(self, values: Tensor) -> Tensor:
        """From the grid to `[blocks of a group, r, c]`, with 0 for what a group lacks at the edge."""
        grid = pad(values.view(self.rows, self.columns), (0, -self.columns % self.across, 0, -self.rows % self.down))
        grid = grid.unflatten(1, (-1, self.across)).unflatten(0, (-1, self.down))
        gathered: Tensor = grid.permute(1, 3, 0, 2).flatten(0, 1).contiguous()
        return gathered

    def reduce(self, values: Tensor, how: Callable[[Tensor, int], Tensor] = torch.sum) -> Tensor:
        """From the grid to one per group; `how` reduces a dimension, in which 0 stands for what a group lacks."""
        return how(self.gather(values), 0)

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """From one per group to the grid, which has `shape`."""
        if values.numel() == 1:
            return values.view([1] * len(shape)).expand(shape)  # no memory, where one number is for the whole weight
        grid = values.repeat_interleave(self.down, 0)[: self.rows]
        return grid.repeat_interleave(self.across, 1)[:, : self.columns].reshape(shape)


def groups_of(scheme: Scheme, n: int, k: int) -> Groups:
    """The groups in the grid of an `[n, k]` weight."""
    assert scheme.outer is not None
    grid, block, outer = scheme.block.grid(n, k), scheme.block, scheme.outer.block
    if len(grid) == 1:
        return Groups(1, grid[0], 1, grid[0])
    down = outer.rows // block.rows if outer.rows else grid[0]
    across = outer.columns // block.columns if outer.columns else grid[1]
    return Groups(grid[0], grid[1], down, across)


@dataclass(frozen=True)
class Second:
    """Chooses second-level numbers: of scales, or of biases, which are not above 0 where their codes have no sign."""

    scheme: Scheme
    groups: Groups
    biases: bool = False

    @property
    def kind(self) -> ScaleType:
        """The first level."""
        return SCALE_TYPES[self.scheme.scale]

    @property
    def plain(self) -> Plain:
        """The format of the second level, so bounded that every product with codes and elements is finite."""
        assert self.scheme.outer is not None
        dtype = SCALE_TYPES[self.scheme.outer.dtype].dtype
        assert dtype is not None
        info, reach = torch.finfo(dtype), self._high * max(self.scheme.spec.bound + 1, 1.0)
        limit = min(info.max, torch.finfo(torch.bfloat16).max / reach)
        floor = max(torch.finfo(torch.float32).smallest_normal, info.smallest_normal * info.eps)
        return Plain(dtype, floor, limit)

    def format(self, stored: Tensor) -> Leveled:
        """The format of the first level under these numbers."""
        assert self.scheme.outer is not None
        return Leveled(self.kind, stored.to(torch.float32), self.scheme.block, self.scheme.outer)

    def spanning(self, values: Tensor) -> Tensor:
        """Stored numbers that bring the largest magnitude of each group to the largest code."""
        return self._stored(self._peak(values) / self._high, self._peak(values))

    def fitting(self, values: Tensor, units: Tensor, weights: Tensor) -> Tensor:
        """Stored numbers with the least `sum(weights * (values - code * number)^2)` in each group, of those tried.

        Differences are taken in `units`, one per group, so that their squares stay finite.
        """
        low, high, count = _FLOAT_REACH if self.kind.pattern is not None else _INTEGER_REACH
        peak, inverse = self._peak(values), reciprocal(units)
        grouped, weights = self.groups.gather(values) * inverse, self.groups.gather(weights)
        best, least = peak, None
        for base in (self._high, self._low) if self._two_sided else (self._high,):
            for factor in torch.linspace(high, low, count).tolist():
                stored = self._stored(peak / (base * factor), peak)
                number = stored.to(torch.float32) * inverse
                difference = self._codes(grouped * reciprocal(number)).mul_(number).sub_(grouped)
                error = difference.square_().mul_(weights).sum(0)
                best = stored if least is None else torch.where(error < least, stored, best)
                least = error if least is None else torch.minimum(error, least)
        return best

    def _codes(self, ratio: Tensor) -> Tensor:
        """The nearest numbers that the first level holds. Writes over its argument."""
        kind = self.kind
        if kind.pattern is not None:
            return ratio.clamp_(-self._high, self._high).to(kind.pattern).to(torch.float32)
        if kind.step == 1:
            return ratio.round_().clamp_(kind.low, kind.high)
        return ratio.sub_(kind.low).div_(kind.step).round_().mul_(kind.step).add_(kind.low).clamp_(kind.low, kind.high)

    def store(self, values: Tensor) -> Tensor:
        """Second-level numbers as they are stored, with the sign that they must have."""
        if not self.kind.signed:
            values = values.clamp(max=0) if self.biases else values.clamp(min=0)
        return self._stored(values, values)

    @property
    def _two_sided(self) -> bool:
        return self.kind.signed and self.kind.pattern is None

    @property
    def _high(self) -> float:
        return torch.finfo(self.kind.pattern).max if self.kind.pattern is not None else float(self.kind.high)

    @property
    def _low(self) -> float:
        return float(self.kind.low)

    def _peak(self, values: Tensor) -> Tensor:
        """The value of the largest magnitude of each group; only its magnitude decides where codes have no sign."""
        low, high = self.groups.reduce(values, torch.amin), self.groups.reduce(values, torch.amax)
        if not self.kind.signed:
            return low if self.biases else high
        if not self._two_sided:
            return torch.maximum(-low, high).abs_()
        return torch.where(high > -low, high, low)

    def _stored(self, values: Tensor, peak: Tensor) -> Tensor:
        # What is not zero must not round to it, and what is, need not be the smallest number instead.
        stored = self.plain.store(values, ())
        nothing = torch.zeros_like(stored)
        return torch.where(peak == 0, nothing, stored) if self.biases else stored
