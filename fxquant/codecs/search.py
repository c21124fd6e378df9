"""Which scale (and zero) a block gets: the one that spans its range, or the one with the least squared error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.family import Family, bounded, reciprocal
from fxquant.codecs.scales import ScaleFormat
from fxquant.scheme import Element

# Uniform quantizers of normal weights clip best at 2.6 (4 bits) to 4 (8 bits) standard deviations: the search goes down
# to 1.9 (4 bits) to 3.1 (8 bits), and always to 0.85 of the range.
_DEVIATIONS, _OFFSET = 0.3, 0.7
_LOWEST, _HIGHEST = 1e-4, 0.85
_FEW = 3
"""Bits of integers for which both signs of a scale are tried."""

ScaleSearch = Literal[
    "absmax",
    "minmax",
    "least_squares",
    "hqq",
    "bitsandbytes",
    "compressed-tensors",
    "torchao",
    "torchao-no-clipping",
    "gguf",
]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = get_args(ScaleSearch)

Weights = Callable[[], Iterator[Tensor]]
"""Gives the pieces of a batch, `[blocks, weights of the piece]`, in units of some scale per block."""


@dataclass(frozen=True)
class Search:
    """What is searched for: the scales of an element, as a format stores them."""

    family: Family
    format: ScaleFormat

    def absmax(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Stored scales and float32 zeros, `[blocks]`, by the absmax rule of the family."""
        scale, zero = self.family.absmax(*extremes(batch))
        return self.format.store(scale, batch.at), zero

    def least_squares(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Stored scales and float32 zeros, `[blocks]`, with the least squared error found: never more than absmax has.

        Each scale of a grid gives codes q, and these have a best scale in closed form: `s = sum(w q) / sum(q^2)`, with
        an error of `sum(w^2) - sum(w q)^2 / sum(q^2)`. The best candidate is rounded and fitted once more, with the
        neighbouring zeros if there are zeros. For int4 and normal weights, 0.3 % above the least error there is.
        Where scales are stored coarsely, the neighbours of the best are tried too; where few values lie differently on
        either side of 0, scales of both signs.
        """
        low, high = extremes(batch)
        unit, zero = self.family.unit(low, high)
        unit = bounded(unit if self.format.signed else unit.abs())
        weights = batch.scaled(reciprocal(unit).unsqueeze(1))
        fit = self._fitted(weights, zero)
        found = self.format.store(fit.scale * unit, batch.at)
        scale, spanning = self.family.absmax(low, high)
        candidates = [(self.format.store(scale, batch.at), spanning), (found, fit.zero)]
        if self.format.signed and zero is None and _lopsided(self.family.element):
            turned = self._fitted(batch.scaled(reciprocal(-unit).unsqueeze(1)), zero)
            candidates.append((self.format.store(turned.scale * -unit, batch.at), None))
        if self.format.coarse:
            candidates += [
                (self.format.neighbour(near, step), offset) for near, offset in candidates[1:] for step in (-1, 1)
            ]
        return self._best(fit, candidates, unit, batch)

    def _fitted(self, weights: Weights, zero: Tensor | None) -> _Fit:
        fit = _Fit(self.family, weights, zero)
        fit.grid()
        fit.polish()
        return fit

    def _best(
        self, fit: _Fit, candidates: list[tuple[Tensor, Tensor | None]], unit: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Of stored scales and zeros, those with the least error; of equal ones the first."""
        (best, best_zero), least = candidates[0], None
        for stored, zero in candidates:
            error = fit.error(self.format.load(stored, batch.at) / unit, zero)
            if least is None:
                least = error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, stored, best)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
        return best, best_zero


class _Fit:
    """The best scale (in units) and zero so far of each block of a batch, and its squared error."""

    scale: Tensor
    _error: Tensor

    def __init__(self, family: Family, weights: Weights, zero: Tensor | None) -> None:
        self._family, self._weights, self.zero = family, weights, zero
        self._scratch: list[Tensor] = []
        squares, sums, count = [], [], 0
        for t in weights():
            squares.append(torch.linalg.vector_norm(t, dim=1).square_())
            sums.append(t.sum(1) if zero is not None else torch.zeros_like(squares[0]))
            count += t.shape[1]
        self._norm = _total(squares)
        # Blocks with a zero point need not be centred; those without one are centred at 0, wherever their mean is.
        self._deviation = (self._norm / count - (_total(sums) / count).square_()).clamp_(min=0).sqrt_()

    def grid(self) -> None:
        """The best of some scales in geometric progression, and then of those halfway to its neighbours.

        They go from a little above the unit down to a multiple of the spread of the weights: the larger a block and the
        heavier its tails, the more of them it pays to clip; with more bits, less.
        """
        family = self._family
        deviations = _DEVIATIONS * family.element.bits + _OFFSET
        bottom = (self._deviation * (deviations / family.extent)).clamp_(_LOWEST, _HIGHEST)
        ratio = (bottom / family.top) ** (1 / (family.tries - 1))
        factors = family.top * ratio ** torch.arange(family.tries, device=ratio.device).unsqueeze(1)
        sums = [self._sums(factor, self.zero) for factor in factors]
        cross, residual = (torch.stack(terms) for terms in zip(*sums, strict=True))
        scales, errors = self._refit(factors, cross, residual)
        self._error, best = errors.min(0)
        start = self.scale = scales.gather(0, best.unsqueeze(0)).squeeze(0)
        for step in (ratio.sqrt(), ratio.rsqrt()):
            self._consider(start * step, self.zero)

    def polish(self) -> None:
        """Round and fit again at the best so far, and at the zeros next to it."""
        element = self._family.element
        if self.zero is not None:
            for step in (-1, 1):
                self._consider(self.scale, (self.zero + step).clamp_(element.low, element.high))
        self._consider(self.scale, self.zero)

    def error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The squared error of each block, in units, with the very codes that a given scale will get."""
        factor = scale.unsqueeze(1)
        zero = None if zero is None else zero.unsqueeze(1)
        errors = []
        for t in self._weights():
            values = self._family.decode(self._family.encode(t * reciprocal(factor), zero))
            if zero is not None:
                values -= zero
            errors.append(torch.linalg.vector_norm(values.mul_(factor).sub_(t), dim=1).square_())
        return _total(errors)

    def _consider(self, scale: Tensor, zero: Tensor | None) -> None:
        scale, error = self._refit(scale, *self._sums(scale, zero))
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def _refit(self, scale: Tensor, cross: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale for the codes q that a scale gives, and the squared error with these codes and that scale.

        From the residuals `r = w / scale - q`, because they keep their digits where the sums in the docstring of
        `least_squares` lose them: at 8 bits these differ by less than a thousandth of a percent.
        """
        squares = self._norm / scale.square() - 2 * cross - residual
        step = torch.where(squares > 0, cross / squares, 0.0)
        return scale + scale * step, (residual - step * cross) * scale.square()

    def _sums(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """`sum(r q)` and `sum(r^2)` of each block."""
        inverse = reciprocal(scale).unsqueeze(1)
        zero = None if zero is None else zero.unsqueeze(1)
        cross, residual = [], []
        for t in self._weights():
            if not self._scratch or self._scratch[0].shape != t.shape:
                # Fresh memory for every product would cost more than the product.
                self._scratch = [torch.empty_like(t) for _ in range(3)]
            r, q, spare = self._scratch
            torch.mul(t, inverse, out=r)
            self._family.project(r, zero, q, spare)
            residual.append(torch.linalg.vector_norm(r.sub_(q), dim=1).square_())
            cross.append(q.mul_(r).sum(1))
        return _total(cross), _total(residual)


def _lopsided(element: Element) -> bool:
    """Whether the sign of a scale matters, and the range of a block does not tell which one is better.

    Of 16 integers, one more on one side is worth having on the side of the largest weight.
    """
    if element.kind == "table":
        return sorted(element.values) != sorted(-value for value in element.values)
    return element.kind == "int" and element.low != -element.high and element.bits <= _FEW


def _total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def extremes(batch: Batch) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each block, 0 included."""
    lows, highs = [], []
    for piece in batch.pieces:
        x = piece()
        lows.append(x.amin(1))  # Two passes are several times as fast as one `aminmax` on a CPU.
        highs.append(x.amax(1))
    return functools.reduce(torch.minimum, lows).clamp_(max=0), functools.reduce(torch.maximum, highs).clamp_(min=0)
