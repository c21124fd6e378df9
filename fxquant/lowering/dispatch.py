"""Which kernel multiplies: by device, dtype and rows of the input. Data; no GPU has measured it yet.

The limits follow from what the ways read and compute. One row of x leaves tensor cores idle, so that only bytes count.
Up to some hundred rows the bytes of the weight still dominate, and codes are decoded next to the product. From there on
a product is bound by arithmetic, where the vendor's library is best: to decode the weight first moves
`(bits / 8 + 2 * itemsize) * n * k` bytes more, which matter the less the more rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from fxquant.lowering.formats import Format

Way = Literal["gemv", "tiles", "decoded"]
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Span:
    """Inputs that go one way."""

    way: Way
    bits: tuple[int, ...] | None
    """Of a code; None: any."""
    dtypes: tuple[torch.dtype, ...]
    """Of the input."""
    most: int | None
    """Rows of the input; None: however many."""
    capability: int = 0
    """The least compute capability of the GPU, times ten."""


WAYS: Mapping[str, tuple[Span, ...]] = MappingProxyType(
    {
        "cuda": (
            Span("gemv", None, (*_HALVES, torch.float32), 1),
            Span("tiles", (2, 4), _HALVES, 192, 80),
            Span("tiles", (8,), _HALVES, 128, 80),
            # Tensor cores would round float32 inputs to tf32: these go to the library, which asks the user.
            Span("decoded", None, (*_HALVES, torch.float32), None),
        )
    }
)
"""By kind of device; the first that fits is taken. What none fits is computed by the op as it is."""


UNKNOWN_ROWS = 64
"""So many rows a symbolic batch is taken to have where nothing tells."""
CODE_ROWS = 128
"""Up to so many rows of codes go to tiles; with more, the library multiplies codes of both sides where it can."""
CODE_MULTIPLES: Mapping[str, int] = MappingProxyType({"int8": 8, "fp8": 16})
"""Rows and columns of a weight are multiples of so many where the library multiplies codes of both sides."""
FLOAT8_CAPABILITY = (8, 9)
"""The least compute capability of GPUs that convert to float8 and multiply it."""
EXPERT_SLOTS = 64
"""Up to so many slots of experts, each reads the planes of its own expert. With more of them, many would read the same
planes: they are sorted into blocks of rows, each of which reads those of one."""
BLOCK_ROWS = (16, 32, 64)
"""Rows of such a block: as many as an expert has slots, in the mean. What tiles compute at once."""


def ways(device: torch.device, form: Format, dtype: torch.dtype, rows: int) -> tuple[Way, ...]:
    """The ways that such a product may go, the best first."""
    spans = [s for s in WAYS.get(kind_of(device), ()) if s.bits is None or form.bits in s.bits]
    spans = [s for s in spans if form.in_units or s.way != "tiles"]
    fitting = [s for s in spans if dtype in s.dtypes and (s.most is None or rows <= s.most)]
    if not fitting:
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return tuple(span.way for span in fitting if span.capability <= 10 * major + minor)


def kind_of(device: torch.device) -> str:
    """The device's type; AMD's GPUs, which torch calls cuda as well, are `hip`."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type
