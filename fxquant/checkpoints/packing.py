"""How files pack codes: the orders that differ from `fxquant.bits`, undone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.bits import pack, unpack
from fxquant.checkpoints.source import ceil_div
from fxquant.scheme import ELEMENTS, Element

# Of eight 4-bit codes, the places in a 32-bit word: AutoAWQ's order, which suits 16-bit SIMD within a word.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
_PLANAR = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def in_pieces(function: Callable[[Tensor], Tensor], rows: Tensor, size: int = 1 << 24) -> Tensor:
    """What a function makes of rows, piece by piece: packing takes eight bytes for a field while it is at work."""
    step = max(size // max(rows[:1].numel(), 1), 1)
    return function(rows) if step >= len(rows) else torch.cat([function(part) for part in rows.split(step)])


def integer(bits: int, signed: bool) -> str:
    """The name of the smallest integer element that holds codes of so many bits."""
    size = next(size for size in (2, 3, 4, 5, 6, 8) if size >= bits)
    return f"{'' if signed else 'u'}int{size}"


def plane_of(fields: Tensor, bits: int, signed: bool) -> Tensor:
    """The plane that stores unsigned fields; of signed codes, fields are counted from the lowest.

    Args:
        fields: uint8 `[rows, columns]`, below `2**bits`.
        bits: 1 to 8.
        signed: whether the code is `field - 2**(bits - 1)` rather than the field.

    Returns:
        As `Scheme.planes` has codes (and zeros) of the element `integer(bits, signed)`.
    """
    spec: Element = ELEMENTS[integer(bits, signed)]
    low = -(1 << (bits - 1)) if signed else 0
    if spec.dtype is not None:
        return (fields.to(torch.int16) + low).to(spec.dtype)
    return in_pieces(lambda part: pack(part + (low - spec.low), spec.bits), fields)


def octets(words: Tensor) -> Tensor:
    """The bytes of a row of words, lowest first: a little-endian bit stream."""
    return words.contiguous().view(torch.uint8)


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of a bit stream in words along the last dimension, as uint8."""
    return in_pieces(lambda part: unpack(octets(part)[..., : ceil_div(count * bits, 8)], bits, count), words)


def words(fields: Tensor, bits: int) -> Tensor:
    """Fields as a bit stream in int32 words along the last dimension, the last word filled up: inverse of `stream`."""
    octets_of = in_pieces(lambda part: pack(part, bits), fields)
    return pad(octets_of, (0, -octets_of.shape[-1] % 4)).view(torch.int32)


def padded(words: Tensor, bits: int, count: int) -> Tensor:
    """As `stream`, for 32-bit words of which each holds whole fields: what is left of a word is wasted."""
    return stream(words.unsqueeze(-1), bits, 32 // bits).flatten(-2)[..., :count]


def planar(words: Tensor, bits: int) -> Tensor:
    """GPTQModel's `gptq_p`: for 32 codes, planes of 4, 2 and 1 bits, the lowest bits first.

    Args:
        words: int32 `[rows, words]`, as many as whole runs of 32 codes take.
        bits: 3, 5, 6 or 7.

    Returns:
        uint8 `[rows, codes]`.
    """
    runs = octets(words).unflatten(-1, (-1, bits * 4))
    total = torch.zeros((*runs.shape[:-1], 32), dtype=torch.uint8, device=words.device)
    start = 0
    for width in _PLANAR[bits]:
        fields = unpack(runs[..., start * 4 : (start + width) * 4], width, 32)
        total |= fields << start
        start += width
    return total.flatten(-2)


def awq(words: Tensor) -> Tensor:
    """Codes of 4 bits in int32 words `[rows, words]`, in AutoAWQ's order of each eight: uint8 `[rows, 8 * words]`."""
    fields: Tensor = unpack(octets(words), 4, words.shape[-1] * 8).unflatten(-1, (-1, 8))[..., list(_AWQ)]
    return fields.flatten(-2)


def awq_words(fields: Tensor) -> Tensor:
    """The inverse of `awq`: uint8 `[rows, columns]`, a multiple of 8, to int32 `[rows, columns / 8]`."""
    order = sorted(range(len(_AWQ)), key=_AWQ.__getitem__)
    return in_pieces(lambda part: words(part.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4), fields)


def awq_fast(words: Tensor) -> Tensor:
    """AutoAWQ's `gemv_fast`: int16 `[N / 4, K]` to uint8 `[N, K]`; K is a multiple of 64.

    Runs of 64 columns of four rows follow each other. Of the 32 columns `8p + 2g + a` of a row, those of one `g` stand
    together, the even ones (`a = 0`) first.
    """
    quarter, k = words.shape
    fields = unpack(octets(words), 4, 4 * k).view(quarter, k // 64, 4, 64).transpose(1, 2)
    return fields.reshape(4 * quarter, k // 32, 4, 2, 4).permute(0, 1, 4, 2, 3).reshape(4 * quarter, k)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Bytes with their halves exchanged."""
    return (packed >> 4) | (packed << 4)


def row_blocks(packed: Tensor, bits: int, highest_first: bool = False) -> Tensor:
    """Fields that hold contiguous blocks of rows: field `i` of `[rows, columns]` belongs to the `i`-th such block.

    Returns:
        uint8 `[rows * fields, columns]`.
    """
    width = 8 * packed.dtype.itemsize
    shifts = range(0, width - bits + 1, bits)
    parts = [((packed >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in shifts]
    return torch.cat(parts[::-1] if highest_first else parts)
