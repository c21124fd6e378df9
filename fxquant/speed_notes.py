"""What a quantized model can gain in speed, in words: bytes that a token reads, and rows up to which it is ahead."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fxquant.devices import DEVICES, Device
from fxquant.scheme import Scheme
from fxquant.tables import bytes_text


class Multiplied(NamedTuple):
    """One weight that inputs are multiplied with."""

    n: int
    k: int
    before: int
    """Bytes in full precision."""
    scheme: Scheme | None
    """None: it stays in full precision."""
    expert: bool = False
    """Read by the tokens that are routed to it alone."""

    @property
    def after(self) -> int:
        """Bytes as they are then."""
        return self.before if self.scheme is None else self.scheme.nbytes(self.n, self.k)


def speed_notes(weights: Sequence[Multiplied]) -> Iterator[str]:
    """Lines about a model whose linears and experts have these weights; none where nothing is quantized."""
    texts = {
        False: "where memory is the bound, as for one row, a token reads {} of weights -> {}",
        True: "and of each matrix of an expert that it is routed to {} -> {}",
    }
    for expert, text in texts.items():
        part = [w for w in weights if w.expert == expert]
        before, after = sum(w.before for w in part), sum(w.after for w in part)
        if any(w.scheme for w in part) and after:
            count = len(part) if expert else 1
            read = text.format(bytes_text(before / count), bytes_text(after / count))
            yield f"{read}: at most {before / after:.2f} times as fast"
    if kinds := {(w.scheme, w.n, w.k) for w in weights if w.scheme is not None and w.n * w.k}:
        ends = ", ".join(f"{_ends(device, kinds)} on an {device.name}" for device in DEVICES.values())
        yield f"rows from which bfloat16 would be as fast, by rates alone: {ends}"


def _ends(device: Device, kinds: set[tuple[Scheme, int, int]]) -> str:
    """`105 to 163`, `163`, `never`, or `163 or never`."""
    found = [_end(device, *kind) for kind in kinds]
    rows = sorted({rows for rows in found if rows is not None})
    words = [f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else str(rows[0])] if rows else []
    return " or ".join([*words, *(["never"] if None in found else [])])


@functools.lru_cache(maxsize=4096)
def _end(device: Device, scheme: Scheme, n: int, k: int) -> int | None:
    from fxquant.cost import overtakes  # imports sympy, which takes a third of a second

    found = overtakes("full", "packed", scheme, device, n, k)
    return None if found is None else math.ceil(found)
