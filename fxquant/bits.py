"""Bit packing: unsigned fields of 1 to 8 bits as a little-endian bit stream along the last dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# Eight fields of `bits` bits fill exactly `bits` bytes, and all of them fit into one 64-bit word.
_FIELDS = 8


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
    if packed.shape[-1] != math.ceil(n * bits / 8):
        raise ValueError(f"{n} fields of {bits} bits take {math.ceil(n * bits / 8)} bytes, got {packed.shape[-1]}")
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


def _words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # `Tensor.view(dtype)` wants aligned storage and unit strides, which a slice of somebody's tensor need not have.
    if not tensor.is_contiguous() or tensor.storage_offset() % dtype.itemsize:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.reshape(-1).view(dtype).view(*tensor.shape[:-1], -1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, _FIELDS * bits, bits, device=device)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"fields have 1 to 8 bits, got {bits}")
