"""Whether weights can be quantized at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codecs.blocks import areas, budget


@torch.no_grad()
def all_finite(weight: Tensor) -> bool:
    """Whether a weight of any shape holds no inf and no nan. Makes no copy of it, not even of one byte per weight.

    A weight on the meta device has no values, and so none that is not finite.
    """
    if weight.is_meta or not weight.numel():
        return True
    if weight.ndim > 2:
        return all(all_finite(part) for part in weight)
    rows = torch.atleast_2d(weight)
    n, k = rows.shape
    parts = [rows[r0:r1, c0:c1] for r0, r1, c0, c1 in areas(n, k, budget(weight.device))]
    extremes = torch.stack([value for part in parts for value in (part.amin(), part.amax())])
    return bool(extremes.isfinite().all())
