"""Float zeros and biases of one level: from scale and bias per block to what is stored of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codecs.affine import Affine
from fxquant.codecs.blocks import Batch, budget
from fxquant.codecs.family import Family, bounded, reciprocal
from fxquant.codecs.grid import Grid, Level
from fxquant.codecs.residuals import Residuals, span, whole_batches
from fxquant.codecs.scales import Plain, ScaleFormat, scale_format
from fxquant.codecs.search import ScaleSearch
from fxquant.scheme import SCALE_TYPES, Scheme


def offset(weight: Tensor, scheme: Scheme, family: Family, search: ScaleSearch, planes: Mapping[str, Tensor]) -> Grid:
    """Fill in scales and float zeros, or biases.

    Args:
        weight: `[N, K]`.
        scheme: with zero `float` or `bias`, and scales of one level.
        family: of its element.
        search: `absmax`, `minmax` or `least_squares`.
        planes: of the scheme; all but codes are written to.
    """
    stored = stored_offsets(scheme, family)
    other = planes["zeros" if scheme.zero == "float" else "biases"]
    for batch in whole_batches(weight, scheme.block, budget(weight.device)):
        found = stored.least_squares(batch) if search == "least_squares" else stored.spanning(batch, search)
        for plane, values in zip((planes["scales"], other), found, strict=True):
            plane[batch.at] = values.view(plane[batch.at].shape)
    return Grid(scheme, Level(stored.scales, planes["scales"]), offsets=Level(stored.offsets, other))


@dataclass(frozen=True)
class Offsets:
    """How scale and bias of `code * scale + bias` are stored: the bias as it is, or as a zero, `-bias / scale`."""

    affine: Affine
    scales: ScaleFormat
    offsets: Plain
    as_zeros: bool

    def spanning(self, batch: Batch, search: ScaleSearch) -> tuple[Tensor, Tensor]:
        """Stored scale and offset by the range of each block, with 0 in it for `absmax`."""
        scale, bias = self.affine.spanning(batch, with_zero=search == "absmax")
        stored = self.scales.store(self._held(scale, bias), batch.at)
        # The smallest weight keeps its code when the scale is rounded.
        smallest = self.affine.element.low
        bias = bias + (scale - self.scales.load(stored, batch.at).reshape(-1)) * smallest
        return stored, self.store(stored, bias, batch)

    def least_squares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Stored scale and offset with the least squared error found: never more than either range has."""
        candidates = [self.spanning(batch, "absmax"), self.spanning(batch, "minmax")]
        low, high = span(batch)
        unit = bounded(torch.maximum(low.abs(), high.abs()))
        residuals, inverse = Residuals(self.affine.family, batch, unit), reciprocal(unit)
        scale, bias = self.affine.least_squares(batch)
        stored = self.scales.store(self._held(scale, bias), batch.at)
        shift = residuals.mean_error(self.scales.load(stored, batch.at).reshape(-1) * inverse, bias * inverse)
        candidates.append((stored, self.store(stored, bias + shift * unit, batch)))
        best, least = candidates[0], None
        for candidate in candidates:
            scale, bias = self.load(*candidate, batch)
            error = residuals.error(scale * inverse, bias * inverse)
            if least is None:
                least = error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1]))
        return best

    def store(self, stored: Tensor, bias: Tensor, batch: Batch) -> Tensor:
        """A bias as it is stored next to a stored scale."""
        if self.as_zeros:
            bias = -bias * reciprocal(self.scales.load(stored, batch.at).reshape(-1))
        return self.offsets.store(bias, batch.at)

    def load(self, scale: Tensor, offset: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scale and bias that are stored, in float32."""
        first = self.scales.load(scale, batch.at).reshape(-1)
        second = self.offsets.load(offset, batch.at).reshape(-1)
        return first, -second * first if self.as_zeros else second

    def _held(self, scale: Tensor, bias: Tensor) -> Tensor:
        """A scale so large that the zero is within reach, and rounded to less than a step; 1 step for a constant."""
        if not self.as_zeros:
            return scale
        size = bias.abs()
        return torch.where(scale > 0, torch.maximum(scale, size * torch.finfo(self.offsets.dtype).eps), size)


def stored_offsets(scheme: Scheme, family: Family) -> Offsets:
    """The formats of a scheme with zero `float` or `bias` and scales of one level."""
    dtype = SCALE_TYPES[scheme.scale].dtype
    assert dtype is not None
    # Half of what bfloat16 and float32 hold leaves room for the sum with scaled codes.
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max / 2)
    scales = scale_format(scheme, family.floor)
    return Offsets(Affine(family), scales, Plain(dtype, 0.0, limit), scheme.zero == "float")
