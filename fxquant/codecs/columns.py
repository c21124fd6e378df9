"""The order of columns in planes that have a permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codecs.blocks import areas, budget, read
from fxquant.codecs.family import reciprocal


def by_norm(weight: Tensor) -> Tensor:
    """Columns by descending norm, so that the largest share blocks with their like; int64 `[K]`.

    Args:
        weight: `[N, K]`, any float dtype and strides; is read twice, in pieces.
    """
    n, k = weight.shape
    largest, squares = torch.zeros(k, device=weight.device), torch.zeros(k, device=weight.device)
    parts = list(areas(n, k, budget(weight.device))) if n else []
    for area in parts:
        at = slice(*area[2:])
        largest[at] = torch.maximum(largest[at], read(weight, area).abs().amax(0))
    inverse = reciprocal(largest)
    for area in parts:
        at = slice(*area[2:])
        squares[at] += (read(weight, area) * inverse[at]).square().sum(0)
    return torch.argsort(squares.sqrt() * largest, descending=True, stable=True)
