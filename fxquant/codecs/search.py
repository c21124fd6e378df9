"""Which scale (and zero) a block gets: the one that spans its range, or the one with the least squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.family import Family, bounded, reciprocal
from fxquant.codecs.scales import ScaleFormat
from fxquant.scheme import Element

_POLISH = 2

Weights = Callable[[], Iterator[Tensor]]
"""Gives the pieces of a batch, `[blocks, weights of the piece]`, in units of some scale per block."""


@dataclass(frozen=True)
class Search:
    """What is searched for: an element of a family, with or without zero points, under a format of scales."""

    family: Family
    element: Element
    asymmetric: bool
    format: ScaleFormat

    def absmax(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Stored scales and float32 zeros, `[blocks]`, by the absmax rule of the family."""
        scale, zero = self.family.absmax(*_range(batch), self.element, self.asymmetric)
        return self.format.store(scale, batch.at), zero

    def least_squares(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Stored scales and float32 zeros, `[blocks]`, with the least squared error found: never more than absmax has.

        Every factor of a grid times the unit scale gives codes, and these codes have a best scale in closed form:
        `s = sum(w q) / sum(q^2)`, with an error of `sum(w^2) - sum(w q)^2 / sum(q^2)`. The best candidate is rounded
        and fitted again a few times, with the neighbouring zeros if there are zeros.
        """
        low, high = _range(batch)
        unit, zero = self.family.unit(low, high, self.element, self.asymmetric)
        unit = bounded(unit)
        weights = batch.scaled(reciprocal(unit).unsqueeze(1))
        fit = _Fit(self, weights, zero)
        fit.grid(self.family.factors)
        for _ in range(_POLISH):
            fit.polish()
        found = self.format.store(fit.scale * unit, batch.at)
        scale, zero = self.family.absmax(low, high, self.element, self.asymmetric)
        spanning = self.format.store(scale, batch.at)
        errors = [
            fit.error(self.format.load(stored, batch.at) / unit, at_zero)
            for stored, at_zero in ((found, fit.zero), (spanning, zero))
        ]
        better = errors[0] < errors[1]
        if zero is not None and fit.zero is not None:
            zero = torch.where(better, fit.zero, zero)
        return torch.where(better, found, spanning), zero


class _Fit:
    """The best scale (in units) and zero so far of each block of a batch, and its squared error."""

    def __init__(self, search: Search, weights: Weights, zero: Tensor | None) -> None:
        self._search, self._weights, self.zero = search, weights, zero
        self._scratch: list[Tensor] = []
        self._norm = sum(t.square().sum(1, dtype=torch.float64) for t in weights())

    def grid(self, factors: tuple[float, ...]) -> None:
        """Start from the best of some factors."""
        tried = [self._refit(factor, self.zero) for factor in factors]
        self._error, best = torch.stack([error for _, error in tried]).min(0)
        self.scale = torch.stack([scale for scale, _ in tried]).gather(0, best.unsqueeze(0)).squeeze(0)

    def polish(self) -> None:
        """Round and fit again at the best so far, and at the zeros next to it."""
        element = self._search.element
        if self.zero is not None:
            for step in (-1, 1):
                self._consider((self.zero + step).clamp_(element.low, element.high))
        self._consider(self.zero)

    def _consider(self, zero: Tensor | None) -> None:
        scale, error = self._refit(self.scale, zero)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def _refit(self, scale: float | Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best scale for the codes q that a scale gives, and the squared error with these codes and that scale.

        From the residuals `r = w / scale - q`, because they keep their digits where the sums in the docstring of
        `least_squares` lose them: their difference is a millionth of either.
        """
        cross, residual = self._sums(scale, zero)
        squares = self._norm / scale**2 - 2 * cross - residual
        step = torch.where(squares > 0, cross / squares, 0.0)
        return (scale * (1 + step)).to(torch.float32), (residual - step * cross) * scale**2

    def _sums(self, scale: float | Tensor, zero: Tensor | None) -> Tensor:
        """`sum(r q)` and `sum(r^2)`, float64."""
        sums = self._norm.new_zeros((2, len(self._norm)))
        inverse = 1.0 / scale if isinstance(scale, float) else reciprocal(scale).unsqueeze(1)
        zero = None if zero is None else zero.unsqueeze(1)
        for t in self._weights():
            if not self._scratch or self._scratch[0].shape != t.shape:
                # Fresh memory for every product would cost more than the product.
                self._scratch = [torch.empty_like(t) for _ in range(3)]
            r, q, spare = self._scratch
            torch.mul(t, inverse, out=r)
            self._search.family.project(r, zero, self._search.element, q, spare)
            sums[1] += torch.linalg.vector_norm(r.sub_(q), dim=1).square_()
            sums[0] += q.mul_(r).sum(1)
        return sums

    def error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The squared error of each block, in units, at a given scale."""
        return self._sums(scale, zero)[1] * scale**2


def _range(batch: Batch) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each block, 0 included."""
    low = high = None
    for piece in batch.pieces:
        x = piece()
        low = x.amin(1) if low is None else torch.minimum(low, x.amin(1))
        high = x.amax(1) if high is None else torch.maximum(high, x.amax(1))
    assert low is not None and high is not None
    return low.clamp_(max=0), high.clamp_(min=0)
