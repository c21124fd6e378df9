"""Where planes lie in memory: all of them that a compiled product depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where and how a plane lies in memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, plane: Tensor) -> Place:
        """That of a tensor that is in memory."""
        return cls(plane.data_ptr(), plane.shape, plane.stride(), plane.dtype)

    def rows(self, stacked: bool) -> tuple[int, int]:
        """Bytes from row to row, 0 where there are none, and from expert to expert, where planes are stacked."""
        size, many = self.dtype.itemsize, len(self.shape) - stacked > 1
        return self.strides[-2] * size if many else 0, self.strides[0] * size if stacked else 0
