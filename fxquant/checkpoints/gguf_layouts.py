"""Where the blocks of GGUF's types have what: data, and one function for each direction.

A block of `size` weights takes `nbytes` bytes. Fields of a plane are `bits` wide parts of bytes, at `shifts`; what is
read from `width` bytes at one shift stands together, then what is at the next shift. Types whose codes have parts in
several places have several `Part`s.

Layouts: https://github.com/ggml-org/llama.cpp/blob/b4000/ggml/src/ggml-common.h, ggml-quants.c; MXFP4, NVFP4, Q1_0 and
Q2_0 of later versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Where bits of some fields of a block are."""

    at: int
    """First byte."""
    count: int
    """Bytes."""
    shifts: tuple[int, ...]
    bits: int
    width: int = 1
    left: int = 0
    """Which bit of the field the lowest one is."""
    start: int = 0
    """Which field of the block the first one is."""


@dataclass(frozen=True)
class Layout:
    """The blocks of one type."""

    scheme: str
    """Its name or spelling."""
    size: int
    nbytes: int
    codes: tuple[Part, ...]
    halves: Mapping[str, int]
    """float16 numbers, one per block: plane, first byte."""
    scales: tuple[Part, ...] = ()
    minima: tuple[Part, ...] = ()
    """What second-level minima multiply: they are subtracted, where biases are added."""
    bytewise: bool = False
    """Whether scales (and not `halves`) are bytes as they are."""


_EVERY_BIT, _EVERY_PAIR, _HALVES = tuple(range(8)), (0, 2, 4, 6), (0, 4)


def _nibbles(at: int, count: int, width: int) -> Part:
    return Part(at, count, _HALVES, 4, width)


# Q4_K and Q5_K have 8 scales and 8 minima of 6 bits in 12 bytes from byte 4 on: the last four of each are cut in two.
_K_SCALES = (Part(4, 4, (0,), 6, 4), Part(12, 4, (0,), 4, 4, start=4), Part(4, 4, (6,), 2, 4, left=4, start=4))
_K_MINIMA = (Part(8, 4, (0,), 6, 4), Part(12, 4, (4,), 4, 4, start=4), Part(8, 4, (6,), 2, 4, left=4, start=4))
_K_HALVES = {"scale_scales": 0, "bias_scales": 2}

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "Q4_0": Layout("q4_0", 32, 18, (_nibbles(2, 16, 16),), {"scales": 0}),
        "Q4_1": Layout("q4_1", 32, 20, (_nibbles(4, 16, 16),), {"scales": 0, "biases": 2}),
        "Q5_0": Layout("q5_0", 32, 22, (_nibbles(6, 16, 16), Part(2, 4, _EVERY_BIT, 1, left=4)), {"scales": 0}),
        "Q5_1": Layout(
            "q5_1", 32, 24, (_nibbles(8, 16, 16), Part(4, 4, _EVERY_BIT, 1, left=4)), {"scales": 0, "biases": 2}
        ),
        "Q8_0": Layout("q8_0", 32, 34, (Part(2, 32, (0,), 8),), {"scales": 0}),
        "Q2_K": Layout(
            "q2_k",
            256,
            84,
            (Part(16, 64, _EVERY_PAIR, 2, 32),),
            {"scale_scales": 80, "bias_scales": 82},
            (Part(0, 16, (0,), 4),),
            (Part(0, 16, (4,), 4),),
        ),
        "Q3_K": Layout(
            "q3_k",
            256,
            110,
            (Part(32, 64, _EVERY_PAIR, 2, 32), Part(0, 32, _EVERY_BIT, 1, 32, left=2)),
            {"scale_scales": 108},
            (Part(96, 8, _HALVES, 4, 8), Part(104, 4, _EVERY_PAIR, 2, 4, left=4)),
        ),
        "Q4_K": Layout("q4_k", 256, 144, (_nibbles(16, 128, 32),), _K_HALVES, _K_SCALES, _K_MINIMA),
        "Q5_K": Layout(
            "q5_k",
            256,
            176,
            (_nibbles(48, 128, 32), Part(16, 32, _EVERY_BIT, 1, 32, left=4)),
            _K_HALVES,
            _K_SCALES,
            _K_MINIMA,
        ),
        "Q6_K": Layout(
            "q6_k",
            256,
            210,
            (_nibbles(0, 128, 64), Part(128, 64, _EVERY_PAIR, 2, 32, left=4)),
            {"scale_scales": 208},
            (Part(192, 16, (0,), 8),),
        ),
        "IQ4_NL": Layout("iq4_nl", 32, 18, (_nibbles(2, 16, 16),), {"scales": 0}),
        "IQ4_XS": Layout(
            "iq4_xs",
            256,
            136,
            (_nibbles(8, 128, 16),),
            {"scale_scales": 0},
            (_nibbles(4, 4, 1), Part(2, 2, _EVERY_PAIR, 2, left=4)),
        ),
        "TQ1_0": Layout("tq1_0", 256, 54, (), {"scales": 52}),
        "TQ2_0": Layout("tq2_0", 256, 66, (Part(0, 64, _EVERY_PAIR, 2, 32),), {"scales": 64}),
        "MXFP4": Layout("mxfp4", 32, 17, (_nibbles(1, 16, 16),), {}, (Part(0, 1, (0,), 8),), bytewise=True),
        "NVFP4": Layout("nvfp4", 64, 36, (_nibbles(4, 32, 8),), {}, (Part(0, 4, (0,), 8),), bytewise=True),
        "Q1_0": Layout("q1_0", 128, 18, (Part(2, 16, _EVERY_BIT, 1),), {"scales": 0}),
        "Q2_0": Layout("q2_0", 64, 18, (Part(2, 16, _EVERY_PAIR, 2),), {"scales": 0}),
    }
)
"""By the name that gguf has for the type."""


def read(blocks: Tensor, parts: Iterable[Part]) -> Tensor:
    """Fields out of blocks.

    Args:
        blocks: uint8 `[..., nbytes]`.
        parts: which together make up the fields of a block.

    Returns:
        uint8 `[..., fields]`.
    """
    parts = tuple(parts)
    out = blocks.new_zeros((*blocks.shape[:-1], _count(parts)))
    for part in parts:
        octets = blocks[..., part.at : part.at + part.count].unflatten(-1, (-1, 1, part.width))
        fields = (octets >> _shifts(part, blocks.device)) & ((1 << part.bits) - 1)
        flat = fields.flatten(-3) << part.left
        out[..., part.start : part.start + flat.shape[-1]] |= flat
    return out


def write(blocks: Tensor, parts: Iterable[Part], fields: Tensor) -> None:
    """Put fields into blocks, whose bits there are zero: the inverse of `read`."""
    for part in parts:
        here = fields[..., part.start : part.start + part.count * len(part.shifts)]
        bits = (here >> part.left) & ((1 << part.bits) - 1)
        spread = bits.unflatten(-1, (-1, len(part.shifts), part.width)) << _shifts(part, blocks.device)
        octets = spread.sum(-2, dtype=torch.uint8).flatten(-2)
        blocks[..., part.at : part.at + part.count] |= octets


def _count(parts: Iterable[Part]) -> int:
    return max(part.start + part.count * len(part.shifts) for part in parts)


def _shifts(part: Part, device: torch.device) -> Tensor:
    return torch.tensor(part.shifts, dtype=torch.uint8, device=device).unsqueeze(-1)
