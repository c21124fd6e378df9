"""Which weights have kernels of their own on a GPU, and how these read the planes. Data only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.scheme import FLOAT_SCALES, SCALE_TYPES, Scheme, Zero


@dataclass(frozen=True)
class Format:
    """How kernels read the planes of an `[n, k]` weight: codes, scales and, where there is a zero, what it takes."""

    bits: int
    """8: a code is a number in its own dtype. 4: two fields to a byte, the even column in the low half."""
    low: int
    """What is added to the fields of integers; 0 where there is a zero point, whose field has the same addend."""
    table: tuple[float, ...]
    """The values of 16 codes; empty for integers."""
    group: int
    """So many weights of a row share a scale."""
    power: bool
    """Scales are exponents: `2**(code - 127)`, 255 is nan."""
    zero: Zero

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def exact(self, dtype: torch.dtype) -> bool:
        """Whether a value without its scale is a number in this dtype, so that its scale may come after the product."""
        if not self.table:
            return self.zero in ("none", "int")
        values = torch.tensor(self.table, dtype=torch.float64)
        return bool((values.to(dtype).to(torch.float64) == values).all())


def format_of(scheme: Scheme, n: int, k: int) -> Format | None:
    """The format of an `[n, k]` weight under a scheme, or None where no kernel here reads it.

    Covered are codes of 4 and 8 bits that are integers, and tables of 16 values, with one level of scales per row or
    per group of a row. Flat blocks are groups where every row consists of whole blocks.
    """
    spec, kind, block = scheme.spec, SCALE_TYPES[scheme.scale], scheme.block
    integers = spec.kind == "int" and not spec.levels and spec.bits in (4, 8)
    if not (integers or (spec.kind == "table" and len(spec.values) == 16)):
        return None
    if scheme.activation or scheme.columns or scheme.double or scheme.outer or block.rows != 1 or not n * k:
        return None
    if not (scheme.scale in FLOAT_SCALES or kind.kind == "power"):
        return None
    group = block.columns or k
    if k % group or (spec.bits == 4 and group % 2):
        return None
    packed = spec.dtype is None and spec.kind == "int" and scheme.zero != "int"
    return Format(spec.bits, spec.low if packed else 0, spec.values, group, kind.kind == "power", scheme.zero)
