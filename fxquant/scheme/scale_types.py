"""What one scale can be stored as: a float, a power of two, or a small integer that a second-level scale multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from fxquant.scheme.blocks import Block


@dataclass(frozen=True)
class ScaleType:
    """One format of scales."""

    kind: Literal["float", "power", "code"]
    """`power`: the exponent of a power of two. `code`: an integer, `low + step * field`."""
    bits: int
    dtype: torch.dtype | None
    """What stores it; None: fields are packed along the rows of the grid into uint8."""
    low: int = 0
    step: int = 1
    signed: bool = True
    """Whether a scale can be negative."""
    pattern: torch.dtype | None = None
    """The float whose bit patterns are stored; None: the dtype's own values."""

    @property
    def high(self) -> int:
        """The largest integer of a `code`."""
        return self.low + self.step * ((1 << self.bits) - 1)


SCALE_TYPES: Mapping[str, ScaleType] = MappingProxyType(
    {
        "fp32": ScaleType("float", 32, torch.float32),
        "bf16": ScaleType("float", 16, torch.bfloat16),
        "fp16": ScaleType("float", 16, torch.float16),
        # As uint8 for the reasons that the elements have, see `Element.float_dtype`.
        "e4m3": ScaleType("float", 8, torch.uint8, pattern=torch.float8_e4m3fn),
        "e8m0": ScaleType("power", 8, torch.uint8, signed=False),
        "i8": ScaleType("code", 8, torch.int8, low=-128),
        "i6": ScaleType("code", 6, None, low=-32),
        "u6": ScaleType("code", 6, None, signed=False),
        "u4": ScaleType("code", 4, None, signed=False),
        "odd4": ScaleType("code", 4, None, low=1, step=2, signed=False),
        "odd3": ScaleType("code", 3, None, low=1, step=2, signed=False),
    }
)
"""e4m3: OCP 8-bit floating point v1.0. e8m0: OCP Microscaling v1.0, section 5.4.1: `2**(code - 127)`, 255 is nan.
The integers are those of GGUF's blocks: 8 and 6 bits (Q6_K; Q3_K, IQ4_XS), 6 bits unsigned (Q4_K, Q5_K), 4 bits (Q2_K),
odd numbers (IQ1, IQ2, IQ3)."""

FLOAT_SCALES = tuple(name for name, kind in SCALE_TYPES.items() if kind.kind == "float" and kind.pattern is None)
"""Types that the second level and zeros can have: torch's own floats."""


@dataclass(frozen=True)
class Outer:
    """The second level of scales: one of them multiplies the scales of many blocks."""

    dtype: str
    """One of `FLOAT_SCALES`."""
    block: Block
    """The weights under one second-level scale: whole blocks."""

    def __str__(self) -> str:
        """`fp32` where one is for the whole weight, else `fp16.g256` and the like."""
        return self.dtype if (self.block.rows, self.block.columns) == (0, 0) else f"{self.dtype}.{self.block}"
