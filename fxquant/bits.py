"""Packing along the last dimension: unsigned fields of 1 to 32 bits as a little-endian bit stream, digits in base 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TRITS_PER_BYTE = 5
"""Three to the fifth is 243: five digits fit into a byte."""

# Eight fields of `bits` bits fill exactly `bits` bytes, and all of them fit into one 64-bit word.
_FIELDS = 8
_WIDEST = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack fields into bytes: field `i` of a row stands at bits `[i * bits, (i + 1) * bits)` of that row, lowest first.

    Every row starts on a byte; what is left of its last byte is zero. At 4 bits the low nibble has the even index.

    Args:
        codes: `[..., n]`, any integer dtype, values in `[0, 2**bits)`.
        bits: 1 to 8.

    Returns:
        uint8 `[..., ceil(n * bits / 8)]`.

    Raises:
        ValueError: when `bits` is not in 1 to 8.
    """
    _check(bits)
    n = codes.shape[-1]
    size = math.ceil(n * bits / 8)
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    if not codes.numel():
        return codes.new_empty((*codes.shape[:-1], size))
    if bits == 4:
        pairs = _words(pad(codes, (0, n % 2)), torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    fields = pad(codes, (0, -n % _FIELDS)).unflatten(-1, (-1, _FIELDS))
    words: Tensor = (fields.to(torch.int64) << _shifts(bits, codes.device)).sum(-1, keepdim=True)
    return words.view(torch.uint8)[..., :bits].flatten(-2)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` fields of every row: the inverse of `pack`.

    Args:
        packed: uint8 `[..., ceil(n * bits / 8)]`.
        bits: 1 to 8.
        n: fields per row.

    Returns:
        uint8 `[..., n]`.

    Raises:
        ValueError: when `bits` is not in 1 to 8, or the rows of `packed` do not have the bytes that `n` fields take.
    """
    _check(bits)
    _check_bytes(packed, math.ceil(n * bits / 8), f"{n} fields of {bits} bits")
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    if not packed.numel():
        return packed.new_empty((*packed.shape[:-1], n))
    if bits == 4:
        pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
        return _words((pairs | (pairs << 4)) & 0x0F0F, torch.uint8)[..., :n]
    groups = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = _words(pad(groups, (0, 8 - bits)), torch.int64)
    fields = (words >> _shifts(bits, packed.device)) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(-2)[..., :n]


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """As `pack`, for fields of up to 32 bits.

    Args:
        codes: `[..., n]`, any integer dtype, values in `[0, 2**bits)`.
        bits: 1 to 32.

    Returns:
        uint8 `[..., ceil(n * bits / 8)]`.

    Raises:
        ValueError: when `bits` is not in 1 to 32.
    """
    _check(bits, _WIDEST)
    fields = (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = fields.flatten(-2)
    octets = pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (octets << torch.arange(8, device=codes.device)).sum(-1)
    return packed.to(torch.uint8)


def unpack_wide(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` fields of every row: the inverse of `pack_wide`.

    Args:
        packed: uint8 `[..., ceil(n * bits / 8)]`.
        bits: 1 to 32.
        n: fields per row.

    Returns:
        int64 `[..., n]`.

    Raises:
        ValueError: when `bits` is not in 1 to 32, or the rows of `packed` do not have the bytes that `n` fields take.
    """
    _check(bits, _WIDEST)
    _check_bytes(packed, math.ceil(n * bits / 8), f"{n} fields of {bits} bits")
    starts = torch.arange(n, device=packed.device) * bits
    spanned = (bits + 7) // 8 + 1
    padded, first = pad(packed, (0, spanned)), starts >> 3
    words = torch.zeros((*packed.shape[:-1], n), dtype=torch.int64, device=packed.device)
    for i in range(spanned):
        words |= padded.index_select(-1, first + i).to(torch.int64) << (8 * i)
    return (words >> (starts & 7)) & ((1 << bits) - 1)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack base-3 digits, five to a byte: digit `i` of a byte counts `3**i`.

    Args:
        codes: `[..., n]`, any integer dtype, values 0, 1 and 2.

    Returns:
        uint8 `[..., ceil(n / 5)]`; what is left of the last byte of a row is zero.
    """
    digits = pad(codes, (0, -codes.shape[-1] % TRITS_PER_BYTE)).unflatten(-1, (-1, TRITS_PER_BYTE))
    packed: Tensor = (digits.to(torch.int16) * _powers(codes.device)).sum(-1)
    return packed.to(torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The first `n` digits of every row: the inverse of `pack_trits`.

    Args:
        packed: uint8 `[..., ceil(n / 5)]`, values below 243.
        n: digits per row.

    Returns:
        uint8 `[..., n]`.

    Raises:
        ValueError: when the rows of `packed` do not have the bytes that `n` digits take.
    """
    _check_bytes(packed, math.ceil(n / TRITS_PER_BYTE), f"{n} digits in base 3")
    digits = packed.to(torch.int16).unsqueeze(-1) // _powers(packed.device) % 3
    return digits.to(torch.uint8).flatten(-2)[..., :n]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**i for i in range(TRITS_PER_BYTE)], dtype=torch.int16, device=device)


def _words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # `Tensor.view(dtype)` wants aligned storage and unit strides, which a slice of somebody's tensor need not have.
    if not tensor.is_contiguous() or tensor.storage_offset() % dtype.itemsize:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.reshape(-1).view(dtype).view(*tensor.shape[:-1], -1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, _FIELDS * bits, bits, device=device)


def _check(bits: int, widest: int = 8) -> None:
    if not 1 <= bits <= widest:
        raise ValueError(f"fields have 1 to {widest} bits, got {bits}")


def _check_bytes(packed: Tensor, size: int, what: str) -> None:
    if packed.shape[-1] != size:
        raise ValueError(f"{what} take {size} bytes, got {packed.shape[-1]}")
