"""Double quantization: scales as 8-bit codes with scales of their own, as QLoRA and bitsandbytes have them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codecs.scales import Grid
from fxquant.scheme import DOUBLE_QUANT_BLOCK, dynamic_values

_LEVELS = 1 << 16


@dataclass(frozen=True)
class Double:
    """Scales as codes of the 8-bit dynamic map, in blocks of 256 with a float32 scale each, around one offset."""

    scale_scales: Tensor
    offset: Tensor
    signed: bool = True
    coarse: bool = False

    def store(self, scales: Tensor, at: Grid) -> Tensor:
        """Float32 scales, uint8 codes: bit-identical to bitsandbytes' CPU kernel (0.50).

        That kernel first rounds to one of 65536 levels, and gives code 0 where all scales of a block are the offset.
        """
        t = (scales - self.offset) * self._spread(self.scale_scales.reciprocal(), at)
        t.nan_to_num_(nan=-1.0).clamp_(-1, 1)
        # One rounding for product and sum, as its compiler makes of it.
        levels = t.add_(1.0).mul_(0.5).to(torch.float64).mul_(_LEVELS - 1).add_(0.5).to(torch.float32).to(torch.int32)
        return self.codes_by_level.index_select(0, levels)

    def load(self, stored: Tensor, at: Grid) -> Tensor:
        """A part of the plane in float32: `map[code] * scale + offset`."""
        values = self.values.index_select(0, stored.to(torch.int32))
        return values * self._spread(self.scale_scales, at) + self.offset

    def neighbour(self, stored: Tensor, step: int) -> Tensor:
        """The next code, whose scale is the next larger one: scales are positive, and the map is sorted."""
        return (stored.to(torch.int16) + step).clamp_(0, 255).to(torch.uint8)

    @functools.cached_property
    def values(self) -> Tensor:
        """What each code stands for, float32 `[256]`."""
        return _dynamic_map_on(self.offset.device)

    @functools.cached_property
    def codes_by_level(self) -> Tensor:
        """The code of each level, uint8 `[65536]`."""
        return _codes_by_level().to(self.offset.device)

    def _spread(self, values: Tensor, at: Grid) -> Tensor:
        blocks = torch.arange(at[0].start, at[0].stop, device=values.device) // DOUBLE_QUANT_BLOCK
        return values.index_select(0, blocks)


def double(scales: Tensor) -> Double:
    """Second-level scales and offset for a whole vector of float32 scales: QLoRA, arXiv 2305.14314, section 3."""
    if not scales.numel():
        return Double(scales, scales.new_zeros(1))
    offset = scales.mean().view(1)
    offset = torch.where(offset.isfinite(), offset, scales.mean(dtype=torch.float64).to(torch.float32))
    centred = scales - offset
    whole = centred.numel() // DOUBLE_QUANT_BLOCK * DOUBLE_QUANT_BLOCK
    tops = [centred[:whole].view(-1, DOUBLE_QUANT_BLOCK).abs().amax(1)]
    if whole < centred.numel():
        tops.append(centred[whole:].abs().amax().view(1))
    return Double(torch.cat(tops), offset)


@functools.lru_cache(maxsize=8)
def _dynamic_map_on(device: torch.device) -> Tensor:
    # Copied to a device once: the host would wait for each copy, and a CUDA graph can hold none.
    return dynamic_map().to(device)


def dynamic_map() -> Tensor:
    """The values of the 8-bit dynamic data type, float32 `[256]`, see `fxquant.scheme.dynamic_values`."""
    return torch.tensor(dynamic_values(), dtype=torch.float32, device="cpu")


def _codes_by_level() -> Tensor:
    values = dynamic_map()
    levels = torch.arange(_LEVELS, dtype=torch.float32) * 2 / (_LEVELS - 1) - 1
    return torch.bucketize(levels, (values[:-1] + values[1:]) / 2).to(torch.uint8)
