"""Elements whose codes index a small table of values: nf4, fp4."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxquant.codecs.family import Family, look_up
from fxquant.scheme import Element

# Weights in units of their scale lie in [-1, 1]. That range is cut into bins so narrow that no bin holds two bounds
# between neighbouring values; one look-up then leaves one comparison to make, instead of a search over the bounds.
_BINS = 2048
# Float32 numbers from 2^23 on are integers, and their lowest bits count them: adding 2^23 rounds and converts in one.
_MAGIC, _MAGIC_BITS = float(1 << 23), 0x4B000000


def _absmax(low: Tensor, high: Tensor, element: Element, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The largest magnitude of a block: QLoRA, arXiv 2305.14314; bit-identical to bitsandbytes."""
    return torch.maximum(-low, high), None


@functools.lru_cache(maxsize=32)
def _lookups(element: Element, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """By bin: the bound in it (or infinity); by bin and side of that bound: the code; by bin: the value at its middle.

    Halfway between two values the lower one is nearer, as in bitsandbytes. Of two codes for 0, the one that a stable
    sort puts first serves up to 0 and the other one what is above.
    """
    values = torch.tensor(element.values, dtype=torch.float32)
    order = torch.argsort(values, stable=True)
    bounds = (values[order][:-1] + values[order][1:]) / 2
    bins = _bin(bounds.clone())
    assert bins.unique().numel() == bins.numel(), "two bounds in one bin"
    bound = torch.full((_BINS,), torch.inf).index_copy_(0, bins.long(), bounds)
    below = torch.bucketize(torch.arange(_BINS), bins.long())
    codes = order[torch.stack((below, below + bound.isfinite()), -1).flatten()].to(torch.uint8)
    middles = values[order][torch.bucketize(torch.arange(_BINS) / (_BINS / 2 - 1) - _BINS / (_BINS - 2), bounds)]
    return bound.to(device), codes.to(device), middles.to(device)


def _bin(t: Tensor) -> Tensor:
    # From 1 to _BINS - 1. Each step is monotone in floating point, so that a bound and the weights on either side of it
    # cannot change places. Writes over its argument.
    return t.clamp_(-1, 1).mul_(_BINS / 2 - 1).add_(_BINS / 2 + _MAGIC).view(torch.int32).sub_(_MAGIC_BITS)


def _encode(t: Tensor, zero: Tensor | None, element: Element) -> Tensor:
    bound, codes, _ = _lookups(element, t.device)
    t = t.clamp_(-1, 1)
    bins = _bin(t.clone()).view(-1)
    above = t.view(-1).gt_(bound.index_select(0, bins)).to(torch.int32)
    return codes.index_select(0, bins.mul_(2).add_(above)).view(t.shape)


def _project(t: Tensor, zero: Tensor | None, element: Element, out: Tensor, spare: Tensor) -> None:
    # By bin alone: wrong only next to a bound, where both values are equally far.
    values = _lookups(element, t.device)[2]
    torch.index_select(values, 0, _bin(spare.copy_(t)).view(-1), out=out.view(-1))


TABLES = Family(
    absmax=_absmax,
    unit=_absmax,
    encode=_encode,
    decode=look_up,
    project=_project,
    factors=tuple(1.1 - 0.35 * i / 11 for i in range(12)),
    floor=0.0,
)
