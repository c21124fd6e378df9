"""Elements: what one code of a weight means. An integer, an index into a table, a small float, an index of a vector."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from fxquant.bits import TRITS_PER_BYTE
from fxquant.errors import SchemeError, nearest
from fxquant.scheme.tables import E2M1, E2M3, E3M2, FP4, IQ4, NF4


@dataclass(frozen=True)
class Vectors:
    """How a code that stands for several weights at once is made up.

    A code consists of one index per book; the vectors that they name are added. Vectors have `rows` x `columns`
    weights. `books` are planes `[groups, 2**bits, rows, columns]`: they belong to the weight, not to the scheme.
    """

    books: tuple[int, ...]
    """Bits of the index into each book."""
    rows: int
    columns: int
    signs: Literal[0, 7, 8] = 0
    """Sign bits per 8 weights along K, in a plane of their own. 7: the eighth is the parity of the others."""
    groups: int = 1
    """Ranges of columns that have books of their own."""


@dataclass(frozen=True)
class Element:
    """What one code means."""

    bits: int
    """Bits of a code. Of a code in base 3 (`trits`), of which five take a byte: 2, for want of a whole number."""
    kind: Literal["int", "table", "float", "vector"]
    low: int = 0
    """Smallest code of an integer element; packed fields hold `code - low`."""
    levels: int = 0
    """How many codes there are; 0: as many as there are fields of `bits` bits."""
    values: tuple[float, ...] = ()
    """Values of a table element, by code."""
    dtype: torch.dtype | None = None
    """The torch dtype that stores one code; None: codes are packed along K into uint8."""
    float_dtype: torch.dtype | None = None
    """The float whose bit patterns the codes of a float element are.

    They are stored as uint8 all the same: torch converts float8 tensors in `model.half()`, cannot index them on a CPU
    and cannot broadcast them over gloo, as DistributedDataParallel does with buffers.
    """
    trits: bool = False
    """Codes are packed as digits in base 3, five to a byte, see `fxquant.bits.pack_trits`."""
    vectors: Vectors | None = None
    """Of a vector element: what a code is made of."""

    @property
    def high(self) -> int:
        """Largest code of an integer or table element."""
        return self.low + (self.levels or 1 << self.bits) - 1

    @property
    def bound(self) -> float:
        """The largest value that a code stands for, by magnitude of the positive side for integers; 1 for vectors."""
        if self.kind == "int":
            return float(self.high)
        if self.kind == "table":
            return max(abs(v) for v in self.values)
        return torch.finfo(self.float_dtype).max if self.float_dtype is not None else 1.0

    def packed(self, columns: int) -> int:
        """Bytes of a row of `columns` codes that are packed."""
        return math.ceil(columns / TRITS_PER_BYTE) if self.trits else math.ceil(columns * self.bits / 8)


def _integer(name: str) -> Element:
    bits = int(name.lstrip("uint"))
    dtype = {"int8": torch.int8, "uint8": torch.uint8}.get(name)
    return Element(bits, "int", low=0 if name[0] == "u" else -(1 << (bits - 1)), dtype=dtype)


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        **{f"int{bits}": _integer(f"int{bits}") for bits in (8, 6, 5, 4, 3, 2)},
        **{f"uint{bits}": _integer(f"uint{bits}") for bits in (8, 6, 5, 4, 3, 2)},
        "ternary": Element(2, "int", low=-1, levels=3),
        "trit": Element(2, "int", low=-1, levels=3, trits=True),
        "nf4": Element(4, "table", values=NF4),
        "fp4": Element(4, "table", values=FP4),
        "e2m1": Element(4, "table", values=E2M1),
        "e2m3": Element(6, "table", values=E2M3),
        "e3m2": Element(6, "table", values=E3M2),
        "iq4": Element(4, "table", values=IQ4),
        "fp8": Element(8, "float", dtype=torch.uint8, float_dtype=torch.float8_e4m3fn),
        "fp8e5m2": Element(8, "float", dtype=torch.uint8, float_dtype=torch.float8_e5m2),
    }
)
"""The elements with a name. `table(v0,v1,...)` and `vq...` are elements too, see `element`."""

_TABLE_SIZES = {2: 1, 4: 2, 8: 3, 16: 4}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
TABLE = re.compile(rf"table\(({_NUMBER}(?:,{_NUMBER})*)\)")
_VECTORS = re.compile(r"vq(\d{1,2}(?:\.\d{1,2})*)x(\d{1,3})(?:r(\d{1,3}))?(?:s([78]))?(?:c(\d{1,6}))?")


@functools.lru_cache(maxsize=1024)
def element(name: str) -> Element:
    """The element of this name.

    Besides the names in `ELEMENTS` there are tables, `table(-1,-0.25,0.25,1)`, of 2, 4, 8 or 16 values by code, and
    vectors, `vq<bits>[.<bits>...]x<columns>[r<rows>][s7|s8][c<groups>]`, see `Vectors`.

    Raises:
        SchemeError: there is none.
    """
    if name in ELEMENTS:
        return ELEMENTS[name]
    if found := TABLE.fullmatch(name):
        return _table(name, tuple(float(value) for value in found[1].split(",")))
    if found := _VECTORS.fullmatch(name):
        books = tuple(int(bits) for bits in found[1].split("."))
        columns, rows, signs, groups = (int(found[i] or default) for i, default in ((2, 1), (3, 1), (4, 0), (5, 1)))
        if min(*books, columns, rows, groups) < 1 or max(books) > 20 or sum(books) > 32:
            raise SchemeError(f"no such vectors: {name!r}: books have 1 to 20 bits, 32 in all, and sizes are positive")
        vectors = Vectors(books, rows, columns, signs, groups)  # type: ignore[arg-type]
        return Element(sum(books), "vector", vectors=vectors)
    raise SchemeError(
        f"no element is called {name!r}{nearest(name, ELEMENTS)}\n"
        f"  elements: {', '.join(ELEMENTS)}, and tables of 16, 8, 4 or 2 values: table(-1,-0.25,0.25,1)"
    )


def _table(name: str, values: tuple[float, ...]) -> Element:
    problem = None
    if len(values) not in _TABLE_SIZES:
        problem = f"it has {len(values)} values, and tables have {', '.join(map(str, _TABLE_SIZES))}"
    elif not all(math.isfinite(value) and abs(value) <= 1e6 for value in values):
        problem = "values lie between -1e6 and 1e6"
    elif max(abs(value) for value in values) < 1e-6:
        problem = "no value is further from 0 than 1e-6"
    elif table_name(values) != name:
        problem = f"its name, with the digits that float32 needs, is {table_name(values)}"
    if problem:
        raise SchemeError(f"no such table: {name!r}: {problem}")
    return Element(_TABLE_SIZES[len(values)], "table", values=values)


def table_name(values: tuple[float, ...]) -> str:
    """The spelling of the element whose codes stand for these values, which are kept in float32."""
    return f"table({','.join(_shortest(value) for value in values)})"


def _shortest(value: float) -> str:
    """The shortest digits that float32 reads back."""
    exact = torch.tensor(value, dtype=torch.float32).item()
    for digits in range(1, 10):
        text = f"{exact:.{digits}g}"
        if torch.tensor(float(text), dtype=torch.float32).item() == exact:
            break
    return text.replace("e+", "e")
