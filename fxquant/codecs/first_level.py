"""Which first-level scales (and biases) the blocks of a batch get under a given second level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.family import Family, bounded, reciprocal
from fxquant.codecs.residuals import Residuals
from fxquant.codecs.scales import Leveled


@dataclass(frozen=True)
class Ideal:
    """What blocks would have if one level could store it: float32, in the grid of blocks or `[blocks]`."""

    scale: Tensor
    bias: Tensor | None
    zero: Tensor | None
    """Integer zeros."""

    @property
    def levels(self) -> list[Tensor]:
        """What has two levels: the scale, and the bias where there is one."""
        return [self.scale] if self.bias is None else [self.scale, self.bias]

    def part(self, at: tuple[slice, ...]) -> Ideal:
        """Of the blocks of a batch, `[blocks]`."""
        parts = (None if grid is None else grid[at].reshape(-1) for grid in (self.scale, self.bias, self.zero))
        scale, bias, zero = parts
        assert scale is not None
        return Ideal(scale, bias, zero)


@dataclass(frozen=True)
class Choice:
    """First-level fields of blocks, as the grid has them, and the squared error in units, `[blocks]`."""

    scale: Tensor
    bias: Tensor | None
    error: Tensor

    def or_better(self, other: Choice) -> Choice:
        """In each block, the choice with the smaller error; this one of equals."""
        better = other.error < self.error
        shaped, bias = better.view_as(self.scale), self.bias
        if bias is not None and other.bias is not None:
            bias = torch.where(shaped, other.bias, bias)
        scale = torch.where(shaped, other.scale, self.scale)
        return Choice(scale, bias, torch.where(better, other.error, self.error))


class _Local(Leveled):
    """A format for one part of the grid, whose second level is spread over the blocks once and for all."""

    def above(self, at: tuple[slice, ...]) -> Tensor:
        return self.top


class FirstLevel:
    """The blocks of one batch, under second-level scales (and biases)."""

    def __init__(self, family: Family, batch: Batch, unit: Tensor, formats: list[Leveled], ideal: Ideal) -> None:
        self._inverse = reciprocal(unit)
        self._residuals = Residuals(family, batch, unit)
        local = [_Local(fmt.inner, fmt.above(batch.at), fmt.block, fmt.outer) for fmt in formats]
        self._scales, self._biases = local[0], local[-1]
        self._at, self._ideal = batch.at, ideal

    def nearest(self) -> Choice:
        """The fields nearest to the ideal."""
        return self._choice(self._scales.store(self._shaped(self._ideal.scale), self._at), self._ideal.bias)

    def best(self) -> Choice:
        """The best of the fields around the ideal: each neighbouring scale with the bias that suits it."""
        field = self._scales.store(self._shaped(self._ideal.scale), self._at)
        choice = self._choice(field, self._suitable(field))
        for step in (-1, 1):
            near = self._scales.neighbour(field, step)
            choice = choice.or_better(self._choice(near, self._suitable(near)))
        if choice.bias is not None:
            middle = choice.bias
            for step in (-1, 1):
                near = self._biases.neighbour(middle, step)
                choice = choice.or_better(self._evaluated(choice.scale, near))
        return choice

    def moments(self, choice: Choice) -> dict[str, Tensor]:
        """By block: the error, and the normal equations of second-level scale and bias, in units."""
        offset = None if choice.bias is None else self._value(self._biases, choice.bias)
        sums = self._residuals.sums(self._value(self._scales, choice.scale), offset, self._ideal.zero)
        scale = self._code(self._scales, choice.scale)
        found = {"error": sums.ee, "scale": scale * sums.qe, "scale_scale": scale.square() * sums.qq}
        if choice.bias is not None:
            bias = self._code(self._biases, choice.bias)
            found |= {
                "bias": bias * sums.e,
                "bias_bias": bias.square() * sums.count,
                "scale_bias": scale * bias * sums.q,
            }
        return found

    def _suitable(self, field: Tensor) -> Tensor | None:
        """The best bias, in full precision, for the codes that this scale and the ideal bias give."""
        bias = self._ideal.bias
        if bias is None:
            return None
        return bias + self._residuals.mean_error(self._value(self._scales, field), bias * self._inverse) / self._inverse

    def _choice(self, field: Tensor, bias: Tensor | None) -> Choice:
        return self._evaluated(field, None if bias is None else self._biases.store(self._shaped(bias), self._at))

    def _evaluated(self, scale: Tensor, bias: Tensor | None) -> Choice:
        offset = None if bias is None else self._value(self._biases, bias)
        return Choice(scale, bias, self._residuals.error(self._value(self._scales, scale), offset, self._ideal.zero))

    def _value(self, fmt: Leveled, field: Tensor) -> Tensor:
        """What a field stands for, in units, `[blocks]`."""
        return fmt.load(field, self._at).reshape(-1) * self._inverse

    def _code(self, fmt: Leveled, field: Tensor) -> Tensor:
        return (fmt.load(field, self._at) / bounded(fmt.above(self._at))).reshape(-1)

    def _shaped(self, values: Tensor) -> Tensor:
        """As the grid has the blocks of this batch."""
        return values.view([part.stop - part.start for part in self._at])
