"""Elements whose codes index a small table of values: nf4, fp4, e2m1, iq4, a user's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.codecs.family import look_up
from fxquant.scheme import Element

# The range of a table is cut into bins so narrow that no bin holds two bounds between neighbouring values; one look-up
# then leaves one comparison to make, instead of a search over the bounds. Where values lie too close, the search it is.
_BINS = 2048
# Float32 numbers from 2^23 on are integers, and their lowest bits count them: adding 2^23 rounds and converts in one.
_MAGIC, _MAGIC_BITS = float(1 << 23), 0x4B000000


@dataclass(frozen=True)
class Tables:
    """`table[code] * scale`."""

    element: Element
    device: torch.device
    floor: ClassVar[float] = 0.0
    divides: ClassVar[bool] = False
    top: ClassVar[float] = 1.1
    tries: ClassVar[int] = 8

    @property
    def extent(self) -> float:
        """The largest magnitude in the table."""
        return self.element.bound

    def absmax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest magnitude of a block over the largest in the table: QLoRA, arXiv 2305.14314.

        Where a table reaches further on one side than on the other, each side of the block fits its own side. For
        nf4 and fp4, bit-identical to bitsandbytes.
        """
        least, most = min(self.element.values), max(self.element.values)
        if least == -most or least >= 0 or most <= 0:
            return torch.maximum(-low, high).abs_() / self.extent, None  # of a block of zeros it may be -0
        return torch.maximum(low / least, high / most).abs_(), None

    def unit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The absmax scale; its sign gives the longer side of the table to the side with the larger weights."""
        least, most = min(self.element.values), max(self.element.values)
        scale = torch.maximum(-low, high) / self.extent
        if least == -most:
            return scale, None
        return torch.where((high > -low) == (most > -least), scale, -scale), None

    def encode(self, t: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest value, the lower one of two equally near: bit-identical to bitsandbytes for its tables."""
        bounds, codes, _ = self._lookups
        if not self._binned:
            return codes[torch.bucketize(t, bounds)]
        bins = self._bin(t, torch.empty_like(t)).view(-1)
        above = t.view(-1).gt_(bounds.index_select(0, bins)).to(torch.int32)
        return codes.index_select(0, bins.mul_(2).add_(above)).view(t.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The values in the table."""
        return look_up(codes, _values(self.element, self.device))

    def project(self, t: Tensor, zero: Tensor | None, out: Tensor, spare: Tensor) -> None:
        """By bin alone: the wrong value only next to a bound, where both values are equally far."""
        bounds, _, values = self._lookups
        if not self._binned:
            torch.index_select(values, 0, torch.bucketize(t, bounds).view(-1), out=out.view(-1))
            return
        torch.index_select(values, 0, self._bin(t, spare).view(-1), out=out.view(-1))

    @property
    def _binned(self) -> bool:
        return len(self._lookups[0]) == _BINS

    @functools.cached_property
    def _lookups(self) -> tuple[Tensor, Tensor, Tensor]:
        bounds, codes, nearest = _lookups(self.element)
        return bounds.to(self.device), codes.to(self.device), nearest.to(self.device)

    def _bin(self, t: Tensor, out: Tensor) -> Tensor:
        return _bin(t, out, self.extent)


@functools.lru_cache(maxsize=64)
def _values(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _lookups(element: Element) -> tuple[Tensor, Tensor, Tensor]:
    """By bin: the bound in it (or infinity); by bin and side of that bound: the code; by bin: the value nearest.

    Of two codes for 0, the one that a stable sort puts first serves up to 0 and the other one what is above.
    Where two bounds fall into one bin: the bounds, and by place among them the code and the value.
    """
    values = torch.tensor(element.values, dtype=torch.float32)
    order = torch.argsort(values, stable=True)
    bounds = (values[order][:-1] + values[order][1:]) / 2
    bins = _bin(bounds, torch.empty_like(bounds), element.bound).to(torch.int64)
    if len(bins.unique()) < len(bins):
        return bounds, order.to(torch.uint8), values[order]
    bound = torch.full((_BINS,), torch.inf).index_copy_(0, bins, bounds)
    below = torch.bucketize(torch.arange(_BINS), bins)
    codes = order[torch.stack((below, below + bound.isfinite()), -1).flatten()].to(torch.uint8)
    middles = (torch.arange(_BINS) - _BINS / 2) / (_BINS / 2 - 1) * element.bound
    return bound, codes, values[order][torch.bucketize(middles, bounds)]


def _bin(t: Tensor, out: Tensor, extent: float) -> Tensor:
    # From 1 to _BINS - 1, in the memory of `out`. Each step is monotone in floating point, so that a bound and the
    # weights on either side of it cannot change places.
    factor = (_BINS / 2 - 1) / extent
    torch.mul(t, factor, out=out).add_(_BINS / 2 + _MAGIC).clamp_(_MAGIC + 1, _MAGIC + _BINS - 1)
    return out.view(torch.int32).sub_(_MAGIC_BITS)
