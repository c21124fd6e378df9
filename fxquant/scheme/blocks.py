"""Blocks: which weights of a matrix share a scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Which weights of `[N, K]` share one scale. 0 means: all of that dimension."""

    rows: int
    columns: int
    flat: bool = False
    """Blocks of `columns` consecutive weights of the flattened matrix, as bitsandbytes has them; may straddle rows."""

    def __str__(self) -> str:
        """The spelling: row, tensor, g128, b128x128, b8x0, flat64."""
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

    @property
    def problem(self) -> str | None:
        """Why there is no such block, or None."""
        if self.flat:
            valid = self.rows == 1 and self.columns >= 1
        else:
            valid = self == TENSOR or (self.rows >= 1 and self.columns >= 0)
        return None if valid else f"no such {'flat ' if self.flat else ''}block: {self.rows} x {self.columns}"

    def divides(self, larger: Block) -> bool:
        """Whether every block of `larger` consists of whole blocks of this one."""
        if self.flat or larger.flat:
            return larger == TENSOR
        return all(
            big == 0 or (small and big % small == 0)
            for small, big in ((self.rows, larger.rows), (self.columns, larger.columns))
        )


TENSOR, ROW = Block(0, 0), Block(1, 0)


def parse_block(text: str) -> Block | None:
    """The block that a word spells, or None."""
    if text in ("row", "tensor"):
        return ROW if text == "row" else TENSOR
    if found := re.fullmatch(r"g([1-9]\d{0,8})", text):
        return Block(1, int(found[1]))
    if found := re.fullmatch(r"flat([1-9]\d{0,8})", text):
        return Block(1, int(found[1]), flat=True)
    if found := re.fullmatch(r"b([1-9]\d{0,8})x(0|[1-9]\d{0,8})", text):
        return Block(int(found[1]), int(found[2]))
    return None
