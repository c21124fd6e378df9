"""Small floats with a scale: fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.codecs.family import float_values, look_up
from fxquant.scheme import Element


@dataclass(frozen=True)
class Floats:
    """`float(code) * scale`."""

    element: Element
    device: torch.device
    floor: ClassVar[float] = torch.finfo(torch.float32).smallest_normal
    divides: ClassVar[bool] = True
    # The relative error of floats repeats with every octave.
    top: ClassVar[float] = 2.0
    tries: ClassVar[int] = 8

    @property
    def extent(self) -> float:
        """The largest finite value."""
        return self.element.bound

    def absmax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale that maps the largest magnitude of a block to the largest finite value."""
        return torch.maximum(-low, high).abs_() / self.extent, None  # of a block of zeros it may be -0

    def unit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The absmax scale."""
        return self.absmax(low, high)

    def encode(self, t: Tensor, zero: Tensor | None) -> Tensor:
        """Torch's own cast; without the clamp, what rounds to more than the largest value would become nan."""
        assert self.element.float_dtype is not None
        return t.clamp_(-self.extent, self.extent).to(self.element.float_dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of the floats; by look-up, which on a CPU is several times as fast as the cast."""
        assert self.element.float_dtype is not None
        return look_up(codes, float_values(self.element.float_dtype, codes.device))

    def project(self, t: Tensor, zero: Tensor | None, out: Tensor, spare: Tensor) -> None:
        """There and back."""
        out.copy_(self.decode(self.encode(spare.copy_(t), zero)))
