"""Scales (and biases) of two levels: nvfp4, and GGUF's K-quants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codecs.affine import Affine
from fxquant.codecs.blocks import Batch, budget
from fxquant.codecs.family import Family, bounded
from fxquant.codecs.first_level import Choice, FirstLevel, Ideal
from fxquant.codecs.grid import Grid, Level
from fxquant.codecs.residuals import Residuals, span, whole_batches
from fxquant.codecs.scales import Plain, pack_fields, scale_format
from fxquant.codecs.search import ScaleSearch, Search
from fxquant.codecs.second_level import Groups, Second, groups_of
from fxquant.scheme import SCALE_TYPES, Scheme

_ROUNDS = 2
"""How often codes and first level are chosen under a second level that is fitted to the last ones."""


def leveled(weight: Tensor, scheme: Scheme, family: Family, search: ScaleSearch, planes: Mapping[str, Tensor]) -> Grid:
    """Fill in the scales and biases of both levels.

    Rows that share no second-level number with others are worked on by themselves, a band at a time, so that what is
    kept in float32 per block is little, unless one number is for the whole weight.

    Args:
        weight: `[N, K]`.
        scheme: with a second level.
        family: of its element.
        search: `absmax`, `minmax` or `least_squares`.
        planes: of the scheme; all but codes and zeros are written to.
    """
    assert scheme.outer is not None
    n, k = weight.shape
    names = ["scale", "bias"] if scheme.zero == "bias" else ["scale"]
    shape, kind = scheme.block.grid(n, k), SCALE_TYPES[scheme.scale]
    fields = {name: torch.empty(shape, dtype=kind.dtype or torch.uint8, device=weight.device) for name in names}
    zeros = None
    if scheme.zero == "int":
        zeros = torch.empty(shape, dtype=scheme.spec.dtype or torch.uint8, device=weight.device)
    for rows in _bands(n, k, scheme, budget(weight.device)):
        found = _Band(weight[rows], scheme, family).found(search)
        below, above = (_grid_rows(rows, rows_of) for rows_of in _heights(scheme))
        for name, first, second in zip(names, found.fields, found.tops, strict=True):
            fields[name][below] = first
            planes[f"{name}_scales"][above] = second
        if zeros is not None and found.zero is not None:
            codes = found.zero if scheme.spec.dtype is not None else found.zero - scheme.spec.low
            zeros[below] = codes.to(zeros.dtype)
    levels = []
    for name, plane in zip(names, ("scales", "biases"), strict=False):
        planes[plane].copy_(pack_fields(fields[name], kind))
        levels.append(Level(scale_format(scheme, top=planes[f"{name}_scales"]), fields[name]))
    return Grid(scheme, levels[0], zeros, levels[1] if len(levels) > 1 else None)


def _bands(n: int, k: int, scheme: Scheme, size: int) -> Iterator[slice]:
    assert scheme.outer is not None
    rows = scheme.outer.block.rows
    if not rows:
        yield slice(0, n)
        return
    step = max(size // (rows * k), 1) * rows
    yield from (slice(start, min(start + step, n)) for start in range(0, n, step))


def _heights(scheme: Scheme) -> tuple[int, int]:
    """Rows of a block and of a second-level one; 0 where the only band is the whole weight."""
    assert scheme.outer is not None
    rows = scheme.outer.block.rows
    return (scheme.block.rows if rows else 0, rows)


def _grid_rows(rows: slice, size: int) -> slice:
    return slice(rows.start // size, math.ceil(rows.stop / size)) if size else slice(None)


@dataclass(frozen=True)
class _Found:
    """A choice for all blocks of a band."""

    tops: list[Tensor]
    """Stored second-level numbers: of scales, and of biases where there are any."""
    fields: list[Tensor]
    """The first level, in the grid of blocks, not packed."""
    zero: Tensor | None
    """Integer zeros, float32."""
    error: Tensor
    """Squared, by group."""
    steps: list[Tensor]
    """What the best second-level numbers for these codes are more than `tops`, float32."""

    def or_better(self, other: _Found, groups: Groups) -> _Found:
        """In each group, the choice with the smaller error; this one of equals."""
        better = other.error < self.error
        blocks = groups.spread(better, self.fields[0].shape)
        zero = self.zero
        if zero is not None and other.zero is not None:
            zero = torch.where(blocks, other.zero, zero)
        return _Found(
            [torch.where(better, b, a) for a, b in zip(self.tops, other.tops, strict=True)],
            [torch.where(blocks, b, a) for a, b in zip(self.fields, other.fields, strict=True)],
            zero,
            torch.where(better, other.error, self.error),
            self.steps,
        )


class _Band:
    """Rows of a weight that share no second-level number with other rows."""

    def __init__(self, weight: Tensor, scheme: Scheme, family: Family) -> None:
        self._weight, self._scheme, self._family = weight, scheme, family
        self._kind, self._biased = SCALE_TYPES[scheme.scale], scheme.zero == "bias"
        self._groups = groups_of(scheme, *weight.shape)
        self._seconds = [Second(scheme, self._groups, biases=biases) for biases in (False, True)[: 1 + self._biased]]
        self._affine = Affine(family, below=not self._kind.signed)
        largest = self._empty()
        for batch in self._batches():
            low, high = span(batch)
            put(largest, batch, torch.maximum(low.abs(), high.abs()))
        self._unit = bounded(self._groups.reduce(largest, torch.amax))
        self._units = self._groups.spread(self._unit, largest.shape)

    def found(self, search: ScaleSearch) -> _Found:
        """What a search finds: `least_squares` has no larger error in any group than the other ones."""
        if search != "least_squares":
            return self._spanning(search)
        best = self._spanning("absmax")
        if self._biased:
            best = best.or_better(self._spanning("minmax"), self._groups)
        ideal = self._ideal(self._searched)
        tops = self._tops(ideal)
        for _ in range(_ROUNDS):
            found = self._settled(ideal, tops, FirstLevel.best)
            best = best.or_better(found, self._groups)
            moved = zip(self._seconds, tops, found.steps, strict=True)
            tops = [second.store(top.to(torch.float32) + step) for second, top, step in moved]
        return best

    def _batches(self) -> Iterator[Batch]:
        return whole_batches(self._weight, self._scheme.block, budget(self._weight.device))

    def _empty(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self._scheme.block.grid(*self._weight.shape), dtype=dtype, device=self._weight.device)

    def _ideal(self, choose: Callable[[Batch], tuple[Tensor, Tensor | None]]) -> Ideal:
        """What `choose` gives for every block: a scale, and a bias or a zero where there is one."""
        scale, other = self._empty(), None if self._scheme.zero == "none" else self._empty()
        for batch in self._batches():
            found, also = choose(batch)
            put(scale, batch, found)
            if other is not None and also is not None:
                put(other, batch, also)
        return Ideal(scale, other, None) if self._biased else Ideal(scale, None, other)

    def _searched(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if self._biased:
            return self._affine.least_squares(batch)
        return Search(self._family, Plain(torch.float32, 0.0, math.inf, self._kind.signed)).least_squares(batch)

    def _spanning(self, search: ScaleSearch) -> _Found:
        """By the range of each block, and of their scales."""

        def choose(batch: Batch) -> tuple[Tensor, Tensor | None]:
            if self._biased:
                return self._affine.spanning(batch, with_zero=search == "absmax")
            low, high = span(batch)
            return self._family.absmax(low.clamp_(max=0), high.clamp_(min=0))

        ideal = self._ideal(choose)
        values = zip(self._seconds, ideal.levels, strict=True)
        return self._settled(ideal, [second.spanning(value) for second, value in values], FirstLevel.nearest)

    def _tops(self, ideal: Ideal) -> list[Tensor]:
        """The second level that fits best to the ideal, above all where an error of the scale costs most."""
        curvatures = [self._empty() for _ in self._seconds]
        for batch in self._batches():
            part, units = ideal.part(batch.at), self._units[batch.at].reshape(-1)
            bias = None if part.bias is None else part.bias / units
            sums = Residuals(self._family, batch, units).sums(part.scale / units, bias, part.zero)
            put(curvatures[0], batch, sums.qq - sums.q.square() / sums.count)
            if self._biased:
                put(curvatures[1], batch, torch.full_like(sums.qq, sums.count))
        parts = zip(self._seconds, ideal.levels, curvatures, strict=True)
        return [second.fitting(value, self._unit, curvature) for second, value, curvature in parts]

    def _settled(self, ideal: Ideal, tops: list[Tensor], choose: Callable[[FirstLevel], Choice]) -> _Found:
        """The first level that `choose` gives under this second one."""
        formats = [second.format(top) for second, top in zip(self._seconds, tops, strict=True)]
        fields = [self._empty(self._kind.dtype or torch.uint8) for _ in tops]
        sums: dict[str, Tensor] = {}
        for batch in self._batches():
            units = self._units[batch.at].reshape(-1)
            level = FirstLevel(self._family, batch, units, formats, ideal.part(batch.at))
            choice = choose(level)
            for field, found in zip(fields, (choice.scale, choice.bias), strict=False):
                put(field, batch, found)
            for name, value in level.moments(choice).items():
                if self._unit.numel() == 1:
                    # No float32 per block, and sums of millions, where one number is for the whole weight.
                    sums[name] = sums.get(name, 0) + value.sum(dtype=torch.float64).view(1, 1)
                else:
                    put(sums.setdefault(name, self._empty()), batch, value)
        if self._unit.numel() > 1:
            sums = {name: self._groups.reduce(value) for name, value in sums.items()}
        return _Found(tops, fields, ideal.zero, sums["error"], [step * self._unit for step in _steps(sums)])


def _steps(sums: Mapping[str, Tensor]) -> list[Tensor]:
    """The solution of the normal equations, by group: how much more the second-level numbers should be."""
    alone = torch.where(sums["scale_scale"] > 0, sums["scale"] / sums["scale_scale"], 0.0)
    if "bias" not in sums:
        return [alone]
    product = sums["scale_scale"] * sums["bias_bias"]
    determinant = product - sums["scale_bias"].square()
    regular = determinant > 1e-5 * product
    scale = sums["bias_bias"] * sums["scale"] - sums["scale_bias"] * sums["bias"]
    bias = sums["scale_scale"] * sums["bias"] - sums["scale_bias"] * sums["scale"]
    return [torch.where(regular, scale / determinant, alone), torch.where(regular, bias / determinant, 0.0)]


def put(grid: Tensor, batch: Batch, values: Tensor | None) -> None:
    """Write what belongs to the blocks of a batch to its place in the grid."""
    if values is not None:
        grid[batch.at] = values.view(grid[batch.at].shape).to(grid.dtype)
