"""Elements whose codes index a small table of values: nf4, fp4."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.codecs.family import look_up
from fxquant.scheme import Element

# Weights in units of their scale lie in [-1, 1]. That range is cut into bins so narrow that no bin holds two bounds
# between neighbouring values; one look-up then leaves one comparison to make, instead of a search over the bounds.
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
        """The largest value of the table, which is 1."""
        return self.element.bound

    def absmax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest magnitude of a block: QLoRA, arXiv 2305.14314; bit-identical to bitsandbytes."""
        return torch.maximum(-low, high), None

    def unit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The absmax scale."""
        return self.absmax(low, high)

    def encode(self, t: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest value, the lower one of two at the same distance: bit-identical to bitsandbytes."""
        bounds, codes, _ = self._lookups
        bins = _bin(t, torch.empty_like(t)).view(-1)
        above = t.view(-1).gt_(bounds.index_select(0, bins)).to(torch.int32)
        return codes.index_select(0, bins.mul_(2).add_(above)).view(t.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The values in the table."""
        return look_up(codes, torch.tensor(self.element.values, dtype=torch.float32, device=self.device))

    def project(self, t: Tensor, zero: Tensor | None, out: Tensor, spare: Tensor) -> None:
        """By bin alone: the wrong value only next to a bound, where both values are equally far."""
        torch.index_select(self._lookups[2], 0, _bin(t, spare).view(-1), out=out.view(-1))

    @functools.cached_property
    def _lookups(self) -> tuple[Tensor, Tensor, Tensor]:
        """By bin: the bound in it (or infinity); by bin and side of that bound: the code; by bin: the value nearest.

        Of two codes for 0, the one that a stable sort puts first serves up to 0 and the other one what is above.
        """
        values = torch.tensor(self.element.values, dtype=torch.float32)
        order = torch.argsort(values, stable=True)
        bounds = (values[order][:-1] + values[order][1:]) / 2
        bins = _bin(bounds, torch.empty_like(bounds)).to(torch.int64)
        bound = torch.full((_BINS,), torch.inf).index_copy_(0, bins, bounds)
        below = torch.bucketize(torch.arange(_BINS), bins)
        codes = order[torch.stack((below, below + bound.isfinite()), -1).flatten()].to(torch.uint8)
        middles = (torch.arange(_BINS) - _BINS / 2) / (_BINS / 2 - 1)
        nearest = values[order][torch.bucketize(middles, bounds)]
        return bound.to(self.device), codes.to(self.device), nearest.to(self.device)


def _bin(t: Tensor, out: Tensor) -> Tensor:
    # From 1 to _BINS - 1, in the memory of `out`. Each step is monotone in floating point, so that a bound and the
    # weights on either side of it cannot change places.
    torch.mul(t, _BINS / 2 - 1, out=out).add_(_BINS / 2 + _MAGIC).clamp_(_MAGIC + 1, _MAGIC + _BINS - 1)
    return out.view(torch.int32).sub_(_MAGIC_BITS)
