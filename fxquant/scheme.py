"""How one weight is stored: frozen data and its spelling. No tensors are made here.

A scheme is an element (what one code means), a block (which weights share a scale), the format of the scales, and
the kind of zero point. Everything else follows from it: which planes there are, their shapes, dtypes and bytes.

    int4            int4-g64-asym       int8            int8-g128       nf4         nf4-dq
    fp4             fp8                 fp8-tensor      uint4-g32       nf4-g64     int8-b128x128-bf16

The weight of a linear is always `[N, K]`: N output features (rows), K input features.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch

from fxquant.errors import SchemeError, nearest

# The 16 values of NormalFloat4: quantiles of N(0, 1) with an exact zero, scaled to [-1, 1].
# QLoRA, arXiv 2305.14314, appendix E; digits as bitsandbytes stores them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' FP4: sign, two exponent bits, one mantissa bit, scaled to [-1, 1]; code order as it stores them.
_FP4_HALF = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)
FP4 = (*_FP4_HALF, *(-v for v in _FP4_HALF))


@dataclass(frozen=True)
class Element:
    """What one code means: an integer, an index into a table of values, or a small float."""

    bits: int
    kind: Literal["int", "table", "float"]
    low: int = 0
    """Smallest code of an integer element; packed fields hold `code - low`."""
    values: tuple[float, ...] = ()
    """Values of a table element, by code."""
    dtype: torch.dtype | None = None
    """The torch dtype that stores one code; None: codes are bit-packed along K into uint8."""
    float_dtype: torch.dtype | None = None
    """The float whose bit patterns the codes of a float element are.

    They are stored as uint8 all the same: torch converts float8 tensors in `model.half()`, cannot index them on a CPU
    and cannot broadcast them over gloo, as DistributedDataParallel does with buffers.
    """

    @property
    def high(self) -> int:
        """Largest code of an integer or table element."""
        return self.low + (1 << self.bits) - 1

    @property
    def bound(self) -> float:
        """The largest value that a code stands for."""
        if self.kind == "int":
            return float(self.high)
        if self.kind == "table":
            return max(abs(v) for v in self.values)
        assert self.float_dtype is not None
        return torch.finfo(self.float_dtype).max


@dataclass(frozen=True)
class Block:
    """Which weights of `[N, K]` share one scale. 0 means: all of that dimension."""

    rows: int
    columns: int
    flat: bool = False
    """Blocks of `columns` consecutive weights of the flattened matrix, as bitsandbytes has them; may straddle rows."""

    def __str__(self) -> str:
        """The spelling: row, tensor, g128, b128x128, flat64."""
        if self.flat:
            return f"flat{self.columns}"
        match self.rows, self.columns:
            case 0, 0:
                return "tensor"
            case 1, 0:
                return "row"
            case 1, columns:
                return f"g{columns}"
            case rows, columns:
                return f"b{rows}x{columns}"

    def grid(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of an `[n, k]` weight: `[rows of blocks, columns of blocks]`, flat: `[blocks]`."""
        if self.flat:
            return (math.ceil(n * k / self.columns),)
        return (math.ceil(n / (self.rows or max(n, 1))), math.ceil(k / (self.columns or max(k, 1))))


TENSOR, ROW = Block(0, 0), Block(1, 0)


@dataclass(frozen=True)
class PlaneSpec:
    """Shape and dtype of one plane."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the plane."""
        return math.prod(self.shape) * self.dtype.itemsize


def _integers(names: Mapping[str, torch.dtype | None]) -> dict[str, Element]:
    widths = {name: int(name.lstrip("uint")) for name in names}
    return {
        name: Element(bits, "int", low=0 if name[0] == "u" else -(1 << (bits - 1)), dtype=names[name])
        for name, bits in widths.items()
    }


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        **_integers({"int8": torch.int8, "int4": None, "uint4": None}),
        "nf4": Element(4, "table", values=NF4),
        "fp4": Element(4, "table", values=FP4),
        "fp8": Element(8, "float", dtype=torch.uint8, float_dtype=torch.float8_e4m3fn),
    }
)
DEFAULT_BLOCK: Mapping[str, Block] = MappingProxyType(
    {
        "int8": ROW,
        "int4": Block(1, 128),
        "uint4": Block(1, 128),
        "nf4": Block(1, 64, flat=True),
        "fp4": Block(1, 64, flat=True),
        "fp8": ROW,
    }
)
SCALE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
DOUBLE_QUANT_BLOCK = 256
"""Scales that share one second-level scale under double quantization (QLoRA, section 3)."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored. `Scheme.parse(spelling)` and `str(scheme)` are inverses.

    The value of a weight is `(code - zero) * scale`, `table[code] * scale` or `float(code) * scale`, in float32.

    Raises:
        SchemeError: when the parts contradict each other (a zero point on a table, say).
    """

    element: str
    """A key of `ELEMENTS`."""
    block: Block
    """Which weights share a scale."""
    scale: str
    """dtype of the scales: a key of `SCALE_DTYPES`."""
    zero: Literal["none", "int"] = "none"
    """`int`: each block has an integer zero point within the range of the codes."""
    double: bool = False
    """The scales are themselves stored as 8-bit codes with a scale per 256 of them and one offset."""

    def __post_init__(self) -> None:
        """Reject parts that contradict each other."""
        if self.element not in ELEMENTS:
            raise SchemeError(
                f"no element is called {self.element!r}{nearest(self.element, ELEMENTS)}\n"
                f"  elements: {', '.join(ELEMENTS)}"
            )
        element, problem = ELEMENTS[self.element], None
        if self.scale not in SCALE_DTYPES:
            problem = f"scales cannot be {self.scale!r}; they can be {', '.join(SCALE_DTYPES)}"
        elif element.kind != "int" and self.zero != "none":
            problem = f"{self.element} has no zero point: only integers are asymmetric"
        elif element.kind == "int" and element.low == 0 and self.zero == "none":
            problem = f"{self.element} needs a zero point: without one it holds no negative weight"
        elif self.block.flat and (self.block.rows != 1 or self.block.columns < 1):
            problem = f"no such flat block: {self.block.rows} x {self.block.columns}"
        elif self.double and not (self.block.flat and self.scale == "fp32"):
            problem = "-dq needs flat blocks with fp32 scales, as bitsandbytes defines it"
        elif self.block not in (TENSOR, ROW) and min(self.block.rows, self.block.columns) < 1:
            problem = f"no such block: {self.block.rows} x {self.block.columns}"
        if problem:
            raise SchemeError(problem)

    @property
    def spec(self) -> Element:
        """The element's data."""
        return ELEMENTS[self.element]

    def __str__(self) -> str:
        """The shortest spelling that parses back to this scheme."""
        parts = [self.element]
        if self.block != DEFAULT_BLOCK[self.element]:
            parts.append(str(self.block))
        if self.zero == "int" and self.spec.low:
            parts.append("asym")
        if self.double:
            parts.append("dq")
        if self.scale != _default_scale(self.block):
            parts.append(self.scale)
        return "-".join(parts)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(spelling: str) -> Scheme:
        """The scheme that `<element>[-g<N>|-row|-tensor|-b<R>x<C>|-flat<N>][-asym][-dq][-<scale dtype>]` spells.

        Raises:
            SchemeError: names the part that is not understood and the nearest spelling.
        """
        name, *parts = spelling.strip().lower().split("-")
        if name not in ELEMENTS:
            raise SchemeError(
                f"unknown scheme {spelling!r}: no element is called {name!r}{nearest(name, ELEMENTS)}\n"
                f"  elements: {', '.join(ELEMENTS)}; e.g. int4-g64, int4-g128-asym, int8, nf4-dq, fp8-tensor"
            )
        block, zero, double, scale = None, "none", False, None
        for part in parts:
            parsed = _parse_block(part)
            if parsed is not None and block is None:
                block = parsed
            elif part == "asym" and zero == "none":
                zero = "int"
            elif part == "dq" and not double:
                double = True
            elif part in SCALE_DTYPES and scale is None:
                scale = part
            else:
                words = ["row", "tensor", "g64", "g128", "b128x128", "flat64", "asym", "dq", *SCALE_DTYPES]
                raise SchemeError(
                    f"unknown scheme {spelling!r}: {part!r} is not understood, or stands there twice"
                    f"{nearest(part, words)}\n"
                    "  a scheme is spelled <element>[-g<N>|-row|-tensor|-b<R>x<C>|-flat<N>][-asym][-dq]"
                    "[-fp32|-bf16|-fp16]"
                )
        block = block or DEFAULT_BLOCK[name]
        if ELEMENTS[name].kind == "int" and ELEMENTS[name].low == 0:
            zero = "int"
        try:
            return Scheme(name, block, scale or _default_scale(block), "int" if zero == "int" else "none", double)
        except SchemeError as error:
            raise SchemeError(f"scheme {spelling!r}: {error}") from None

    def misfit(self, n: int, k: int) -> str | None:
        """Why an `[n, k]` weight cannot be stored under this scheme, or None where it can."""
        if not self.block.flat and self.block.rows == 1 and self.block.columns and k % self.block.columns:
            return f"K={k} is not a multiple of the group {self.block.columns}"
        return None

    def planes(self, n: int, k: int) -> dict[str, PlaneSpec]:
        """The planes of an `[n, k]` weight, in the order in which ops take them.

        `codes`: `[n, k]` in the element's own dtype, or uint8 `[n, ceil(k * bits / 8)]`, a little-endian bit stream
        along K, each row starting on a byte. `scales`: the block grid. `zeros`: the block grid, stored as the codes
        are. Under double quantization `scales` are uint8 codes, `scale_scales` float32, one per 256 of them, and
        `scale_offset` float32 `[1]`.
        """
        grid = self.block.grid(n, k)
        specs = {"codes": self._coded(n, k)}
        if self.double:
            specs["scales"] = PlaneSpec(grid, torch.uint8)
            specs["scale_scales"] = PlaneSpec((math.ceil(grid[0] / DOUBLE_QUANT_BLOCK),), torch.float32)
            specs["scale_offset"] = PlaneSpec((1,), torch.float32)
        else:
            specs["scales"] = PlaneSpec(grid, SCALE_DTYPES[self.scale])
        if self.zero == "int":
            specs["zeros"] = self._coded(*grid) if len(grid) == 2 else self._coded(1, *grid)
        return specs

    def _coded(self, rows: int, columns: int) -> PlaneSpec:
        if self.spec.dtype is not None:
            return PlaneSpec((rows, columns), self.spec.dtype)
        return PlaneSpec((rows, math.ceil(columns * self.spec.bits / 8)), torch.uint8)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of all planes of an `[n, k]` weight."""
        return sum(spec.nbytes for spec in self.planes(n, k).values())

    def bits_per_weight(self, n: int = 4096, k: int = 4096) -> float:
        """Bits of all planes divided by the number of weights, for an `[n, k]` weight."""
        return 8 * self.nbytes(n, k) / (n * k)

    def with_group(self, size: int) -> Scheme:
        """The same scheme with groups of `size` along K."""
        return replace(self, block=Block(1, size))


def _parse_block(part: str) -> Block | None:
    if part in ("row", "tensor"):
        return ROW if part == "row" else TENSOR
    if found := re.fullmatch(r"g([1-9]\d{0,8})", part):
        return Block(1, int(found[1]))
    if found := re.fullmatch(r"flat([1-9]\d{0,8})", part):
        return Block(1, int(found[1]), flat=True)
    if found := re.fullmatch(r"b([1-9]\d{0,8})x([1-9]\d{0,8})", part):
        return Block(int(found[1]), int(found[2]))
    return None


def _default_scale(block: Block) -> str:
    # A scale per group costs bits, and bfloat16 has float32's range, so that no weight underflows; codes are chosen
    # against the rounded scale, so its short mantissa costs next to nothing. Elsewhere float32 is as good as free.
    return "fp32" if block.flat or not block.columns else "bf16"
