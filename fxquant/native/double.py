"""Double quantization, compiled: absmax scales of all blocks, their second level, and a search under that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fxquant.native.job import Job

_CODES = 4
_STEP = 1 << 17


class Double(Protocol):
    """The second level of a vector of scales, see `fxquant.codecs.double.Double`."""

    @property
    def scale_scales(self) -> Tensor:
        """Float32, one per 256 scales."""
        ...

    @property
    def offset(self) -> Tensor:
        """Float32 `[1]`."""
        ...

    @property
    def values(self) -> Tensor:
        """What each code stands for, float32 `[256]`."""
        ...

    @property
    def codes_by_level(self) -> Tensor:
        """The code of each level, uint8 `[65536]`."""
        ...

    def store(self, scales: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Codes, uint8, of a part of the scales."""
        ...


def quantize_double(
    job: Job, planes: Mapping[str, Tensor], double: Callable[[Tensor], Double], run: Callable[[Tensor], None]
) -> None:
    """Fill in the planes of a weight with double quantization.

    Args:
        job: filled in for the scheme; changed.
        planes: to write to.
        double: gives the second level.
        run: does the job, given the scales that it writes.
    """
    search, codes = job.search, job.codes
    first = torch.empty(planes["scales"].shape)
    job.scales, job.scale_type, job.floor, job.limit, job.search = first.data_ptr(), 0, 0.0, math.inf, 0
    job.codes = None if search else codes
    run(first)
    level = double(first)
    planes["scale_scales"].copy_(level.scale_scales)
    planes["scale_offset"].copy_(level.offset)
    if not search:
        for start in range(0, len(first), _STEP):
            at = (slice(start, min(start + _STEP, len(first))),)
            planes["scales"][at] = level.store(first[at], at)
        return
    above, values, by_level = level.scale_scales, level.values, level.codes_by_level
    job.scales, job.scale_type, job.search, job.codes = planes["scales"].data_ptr(), _CODES, search, codes
    job.scale_scales, job.code_values, job.levels = above.data_ptr(), values.data_ptr(), by_level.data_ptr()
    job.scale_offset = level.offset.item()
    run(planes["scales"])
