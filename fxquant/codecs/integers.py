"""Integers with a scale, and a zero point or none: int8, int4, uint4, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.scheme import Element, Zero


@dataclass(frozen=True)
class Integers:
    """`(code - zero) * scale`."""

    element: Element
    zero: Zero
    floor: ClassVar[float] = torch.finfo(torch.float32).smallest_normal
    divides: ClassVar[bool] = False
    top: ClassVar[float] = 1.05
    tries: ClassVar[int] = 8

    @property
    def extent(self) -> float:
        """Half the number of steps."""
        return (self.element.high - self.element.low) / 2

    def absmax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale that makes the whole range of a block representable.

        Bit-identical to torchao's `choose_qparams_affine` on float32 weights. Symmetric: `SYMMETRIC_NO_CLIPPING_ERR`,
        the mapping under which no weight is clipped (`SYMMETRIC` maps the largest one to 7.5 of 7), so that every
        weight is within half a step. Asymmetric: `ASYMMETRIC`, with an integer zero point in the range of the codes.
        """
        smallest, largest = self.element.low, self.element.high
        if self.zero == "none":
            scale = torch.maximum(low / float(smallest), high / float(largest))
            return scale.clamp_(min=self.floor), None
        scale = ((high - low) / float(largest - smallest)).clamp_(min=self.floor)
        return scale, (smallest - torch.round(low / scale)).clamp_(smallest, largest)

    def unit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Range divided by steps. Its sign gives the one more negative code to the side with the larger weights."""
        if self.zero != "none":
            return self.absmax(low, high)
        scale = torch.maximum(-low, high) / self.extent
        return torch.where(high > -low, -scale, scale), None

    def encode(self, t: Tensor, zero: Tensor | None) -> Tensor:
        """Round half to even and add the zero, an integer; or add a zero that is none, and round. Then clamp."""
        if zero is not None and self.zero == "float":
            codes = t.add_(zero).round_()
        else:
            codes = t.round_() if zero is None else t.round_().add_(zero)
        codes.clamp_(self.element.low, self.element.high)
        if self.element.dtype is not None:
            return codes.to(self.element.dtype)
        return codes.sub_(self.element.low).to(torch.int8).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The integers as float32."""
        values = codes.to(torch.float32, copy=True)
        return values if self.element.dtype is not None else values.add_(self.element.low)

    def project(self, t: Tensor, zero: Tensor | None, out: Tensor, spare: Tensor) -> None:
        """Round and clamp."""
        torch.round(t, out=out)
        if zero is None:
            out.clamp_(self.element.low, self.element.high)
        else:
            torch.maximum(out, self.element.low - zero, out=out)
            torch.minimum(out, self.element.high - zero, out=out)
