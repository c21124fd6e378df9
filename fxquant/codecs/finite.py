"""How large the values of a weight are, and whether all are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.codecs.blocks import areas, budget


@torch.no_grad()
def magnitude(weight: Tensor) -> float:
    """The largest magnitude in a weight of any shape; inf or nan where it holds one. Makes no copy of it.

    A weight on the meta device has no values: 0.
    """
    if weight.is_meta or not weight.numel():
        return 0.0
    if weight.ndim > 2:
        return float(torch.tensor([magnitude(part) for part in weight]).amax())  # amax keeps a nan, max() loses it
    rows = torch.atleast_2d(weight)
    n, k = rows.shape
    parts = [rows[r0:r1, c0:c1] for r0, r1, c0, c1 in areas(n, k, budget(weight.device))]
    extremes = torch.stack([value for part in parts for value in torch.aminmax(part)])
    return float(extremes.abs().amax())


def all_finite(weight: Tensor) -> bool:
    """Whether a weight of any shape holds no inf and no nan."""
    return math.isfinite(magnitude(weight))
