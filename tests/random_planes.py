"""Planes with random contents that are valid under any scheme, those too that no weight can be quantized to."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.bits import pack
from fxquant.scheme import SCALE_TYPES, PlaneSpec, Scheme


def random_planes(scheme: Scheme, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Every code that there is, scales around 0.01 to 1, and columns in random order."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _plane(name, spec, scheme, k, generator) for name, spec in scheme.planes(n, k).items()}


def _plane(name: str, spec: PlaneSpec, scheme: Scheme, k: int, generator: torch.Generator) -> Tensor:
    element = scheme.spec
    if name == "perm":
        return torch.randperm(k, generator=generator).to(torch.int32)
    if spec.dtype.is_floating_point:
        return (torch.rand(spec.shape, generator=generator) + 0.1).to(spec.dtype)
    if name == "codes" and element.trits:
        return torch.randint(0, 243, spec.shape, generator=generator, dtype=torch.uint8)
    if name == "codes" and element.levels:
        fields = torch.randint(0, element.levels, (spec.shape[0], k), generator=generator)
        return pack(fields, element.bits)
    if name == "codes" and element.float_dtype is not None:
        values = torch.randn(spec.shape, generator=generator).to(element.float_dtype)
        return values.view(torch.uint8)
    if name in ("scales", "biases") and SCALE_TYPES[scheme.scale].kind == "power":
        return torch.randint(118, 128, spec.shape, generator=generator, dtype=torch.uint8)
    if name in ("scales", "biases") and SCALE_TYPES[scheme.scale].pattern is not None:
        return torch.randint(0x20, 0x40, spec.shape, generator=generator, dtype=torch.uint8)
    info = torch.iinfo(spec.dtype)
    return torch.randint(info.min, info.max + 1, spec.shape, generator=generator, dtype=spec.dtype)
