"""Scale and offset of blocks whose range need not include 0: schemes with float zeros or biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.family import Family, bounded, reciprocal
from fxquant.codecs.residuals import Residuals, span
from fxquant.scheme import Element

# How far ranges are shrunk towards the mean of a block, by bits: what clips best of normal weights lies inside.
_SHORTEST = {2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.85, 8: 0.92}
_STARTS = 7


@dataclass(frozen=True)
class Affine:
    """`code * scale + bias` of an integer element, with a bias that is not above 0 where it is `below` it."""

    family: Family
    below: bool = False

    @property
    def element(self) -> Element:
        """Which integers."""
        return self.family.element

    def spanning(self, batch: Batch, with_zero: bool) -> tuple[Tensor, Tensor]:
        """Scale and bias that make the range of each block representable, `[blocks]`; with 0 in it or not."""
        low, high = span(batch)
        if with_zero or self.below:
            low = low.clamp(max=0)
        if with_zero:
            high = high.clamp(min=0)
        return self.between(low, high)

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and bias that give `low` the smallest code and `high` the largest."""
        element = self.element
        # Of the halves, because the difference can be more than float32 holds.
        scale = (high / 2 - low / 2) / ((element.high - element.low) / 2)
        return scale, low - scale * element.low

    def least_squares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scale and bias with the least squared error that alternation between codes and linear regression finds.

        It starts from the range of each block and from ranges shrunk towards its mean, takes a few steps from the best
        of them, and tries what lies half a step of the codes beside it.
        """
        low, high = span(batch)
        unit = bounded(torch.maximum(low.abs(), high.abs()))
        fit = _Fit(self, Residuals(self.family, batch, unit))
        inverse = reciprocal(unit)
        fit.start(low * inverse, high * inverse)
        fit.polish()
        return fit.scale * unit, fit.bias * unit


class _Fit:
    """The best scale and bias so far of each block, in units."""

    ratios: ClassVar[tuple[float, ...]] = (0.96, 1.04)
    shifts: ClassVar[tuple[float, ...]] = (-0.4, 0.4)

    def __init__(self, affine: Affine, residuals: Residuals) -> None:
        self._affine, self._residuals = affine, residuals
        self._error: Tensor | None = None
        self.scale = self.bias = torch.empty(0)

    def start(self, low: Tensor, high: Tensor) -> None:
        mean = self._residuals.mean()
        shortest = _SHORTEST[self._affine.element.bits]
        for i in range(_STARTS):
            factor = 1.0 + (shortest - 1.0) * i / (_STARTS - 1)
            bottom = mean + (low - mean) * factor
            if self._affine.below:
                bottom.clamp_(max=0)
            self.consider(*self._affine.between(bottom, mean + (high - mean) * factor))

    def polish(self) -> None:
        for ratio in self.ratios:
            for shift in self.shifts:
                middle = (self._affine.element.high + self._affine.element.low) / 2
                scale = self.scale * ratio
                self.consider(scale, self.bias + (self.scale - scale) * middle + shift * scale)
            self.consider(self.scale, self.bias)
        self.consider(self.scale, self.bias)

    def consider(self, scale: Tensor, bias: Tensor) -> None:
        """The codes at this scale and bias, with the scale and bias that are best for them."""
        if self._affine.below:
            bias = bias.clamp(max=0)
        sums = self._residuals.sums(scale, bias)
        step, shift = sums.step(-bias if self._affine.below else None)
        error = sums.after(step, shift)
        scale, bias = scale + step, bias + shift
        if self._error is None:
            self._error, self.scale, self.bias = error, scale, bias
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.bias = torch.where(better, bias, self.bias)
