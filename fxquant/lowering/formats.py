"""How kernels on a GPU read the planes of a weight. Data only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxquant.scheme import FLOAT_SCALES, SCALE_TYPES, Scheme, Zero


@dataclass(frozen=True)
class Format:
    """Of an `[n, k]` weight: what a code stands for, and how many weights of a row have a scale in common."""

    bits: int
    """Of a code."""
    low: int
    """What is added to the fields of integers; 0 where there is a zero point, whose field has the same addend."""
    table: tuple[float, ...]
    """The values of the codes; empty for integers and floats."""
    pattern: torch.dtype | None
    """The float whose bit patterns codes are; None for integers and tables."""
    regular: bool
    """A code of 1 to 8 bits, in a stream of them, is one weight: no vectors of codebooks, no digits in base 3, no
    columns with scales or biases of their own."""
    group: int
    """So many neighbours in a row share a scale, and no scale is for fewer of them."""
    power: bool
    """Scales are exponents: `2**(code - 127)`, 255 is nan."""
    zero: Zero
    direct: bool
    """Scales, zeros and biases stand in their planes as `[n, k / group]` numbers. Elsewhere they are computed: the
    product of two levels, say, or that of the block of several rows in which a row lies."""

    @property
    def per_unit(self) -> int:
        """Codes that are read at a time: those of a byte, or what two bytes hold wherever the first one starts."""
        return 8 // self.bits if 8 % self.bits == 0 else 1 << (12 // self.bits).bit_length() - 1

    @property
    def in_units(self) -> bool:
        """Whether a row is groups, these are units, and these are codes."""
        return self.regular and self.group % self.per_unit == 0

    def exact(self, dtype: torch.dtype) -> bool:
        """Whether a value without its scale is a number in this dtype, so that its scale may come after the product."""
        if self.table:
            values = torch.tensor(self.table, dtype=torch.float64)
            return bool((values.to(dtype).to(torch.float64) == values).all())
        # Every float8 is a bfloat16 and a float16.
        return self.zero in ("none", "int")


def format_of(scheme: Scheme, n: int, k: int) -> Format | None:
    """The format of an `[n, k]` weight under a scheme, or None where it is empty."""
    spec, kind, block = scheme.spec, SCALE_TYPES[scheme.scale], scheme.block
    if not n * k:
        return None
    width = block.columns or k
    direct = block.rows == 1 and k % width == 0 and scheme.outer is None and not scheme.double
    direct = direct and (scheme.scale in FLOAT_SCALES or kind.kind == "power")
    # The zeros of flat blocks are packed across rows.
    direct = direct and not (block.flat and scheme.zero == "int")
    packed = spec.kind == "int" and spec.dtype is None and scheme.zero != "int"
    return Format(
        bits=spec.bits,
        low=spec.low if packed else 0,
        table=spec.values,
        pattern=spec.float_dtype,
        regular=spec.vectors is None and not spec.trits and scheme.columns in ((), ("perm",)),
        group=math.gcd(width, k),
        power=direct and kind.kind == "power",
        zero=scheme.zero,
        direct=direct,
    )
