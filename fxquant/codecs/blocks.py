"""Blocks of a weight matrix: reading them as rows of a float32 matrix, and laying their scales over the weights again.

Everything goes in pieces of bounded size: no function here makes a float32 copy of a whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.scheme import Block

Area = tuple[int, int, int, int]
"""First and last row (exclusive), first and last column (exclusive)."""


def budget(device: torch.device) -> int:
    """Weights to work on at a time: few enough to stay in a core's cache, enough to pay for the kernel launches."""
    if device.type == "cpu":
        return min(torch.get_num_threads() << 17, 1 << 21)
    return 1 << 22


def areas(n: int, k: int, size: int, alignment: int = 8) -> Iterator[Area]:
    """Cut `[n, k]` into areas of about `size` weights: whole rows, or parts of a row, on multiples of `alignment`."""
    if k <= size:
        step = size // max(k, 1)
        yield from ((r, min(r + step, n), 0, k) for r in range(0, n if k else 0, step))
    else:
        step = max(size // alignment * alignment, alignment)
        yield from ((r, r + 1, c, min(c + step, k)) for r in range(n) for c in range(0, k, step))


def read(weight: Tensor, area: Area) -> Tensor:
    """An area of the weight in float32, contiguous. May share memory with the weight: not to be written to."""
    r0, r1, c0, c1 = area
    return _float(weight[r0:r1, c0:c1])


def _float(part: Tensor) -> Tensor:
    if part.dtype == torch.float64:
        # Finite in, finite out: what float32 cannot hold saturates.
        part = part.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return part.to(torch.float32).contiguous()


def _read_flat(weight: Tensor, start: int, stop: int) -> Tensor:
    if weight.is_contiguous():
        return _float(weight.view(-1)[start:stop])
    k = weight.shape[1]
    first = start // k
    rows = _float(weight[first : math.ceil(stop / k)]).view(-1)
    return rows[start - first * k : stop - first * k]


@dataclass(frozen=True)
class Batch:
    """Some blocks of one weight.

    `pieces` are functions that read a part of every block, float32 `[blocks, weights of the part]`. Blocks on the edge
    of the matrix are filled up with zeros, which no element fails to represent: they change no range and no error.
    """

    at: tuple[slice, ...]
    """Where the blocks stand in the grid of scales."""
    pieces: tuple[Callable[[], Tensor], ...]

    def scaled(self, inverse: Tensor) -> Callable[[], Iterator[Tensor]]:
        """Something to call for the pieces times `inverse` (`[blocks, 1]`), read once where there is only one."""
        if len(self.pieces) > 1:
            return lambda: (piece() * inverse for piece in self.pieces)
        only = self.pieces[0]() * inverse
        return lambda: iter((only,))


def _loaded(x: Tensor) -> tuple[Callable[[], Tensor]]:
    return (lambda: x,)


def batches(weight: Tensor, block: Block, size: int) -> Iterator[Batch]:
    """Every block of the weight once, in batches of about `size` weights; a block larger than that comes in pieces."""
    n, k = weight.shape
    if not n * k:
        return iter(())
    if block.flat:
        return _flat_batches(weight, block.columns, size)
    return _tile_batches(weight, min(block.rows or n, n), min(block.columns or k, k), size)


def _flat_batches(weight: Tensor, columns: int, size: int) -> Iterator[Batch]:
    total = weight.numel()
    whole, blocks = total // columns, math.ceil(total / columns)
    if columns > size:
        for b in range(blocks):
            end = min((b + 1) * columns, total)
            starts = range(b * columns, end, size)
            yield Batch((slice(b, b + 1),), tuple(_flat_piece(weight, f, min(f + size, end)) for f in starts))
        return
    step = size // columns
    for b in range(0, whole, step):
        stop = min(b + step, whole)
        yield Batch((slice(b, stop),), _loaded(_read_flat(weight, b * columns, stop * columns).view(-1, columns)))
    if whole < blocks:
        yield Batch((slice(whole, blocks),), _loaded(_read_flat(weight, whole * columns, total).view(1, -1)))


def _flat_piece(weight: Tensor, start: int, stop: int) -> Callable[[], Tensor]:
    return lambda: _read_flat(weight, start, stop).view(1, -1)


def _tile_batches(weight: Tensor, rows: int, columns: int, size: int) -> Iterator[Batch]:
    n, k = weight.shape
    bands, tiles = math.ceil(n / rows), math.ceil(k / columns)
    if rows * columns > size:
        for band in range(bands):
            for tile in range(tiles):
                at = (slice(band, band + 1), slice(tile, tile + 1))
                yield Batch(at, tuple(_tile_pieces(weight, band * rows, tile * columns, rows, columns, size)))
        return
    across = min(max(size // (rows * columns), 1), tiles)
    down = max(size // (rows * columns * tiles), 1)
    for band in range(0, bands, down):
        for tile in range(0, tiles, across):
            stop = (min(band + down, bands), min(tile + across, tiles))
            area = (band * rows, min(stop[0] * rows, n), tile * columns, min(stop[1] * columns, k))
            x = _tiled(read(weight, area), rows, columns)
            yield Batch((slice(band, stop[0]), slice(tile, stop[1])), _loaded(x))


def _tile_pieces(
    weight: Tensor, row: int, column: int, rows: int, columns: int, size: int
) -> Iterator[Callable[[], Tensor]]:
    n, k = weight.shape
    for r0, r1, c0, c1 in areas(min(rows, n - row), min(columns, k - column), size):
        yield _tile_piece(weight, (row + r0, row + r1, column + c0, column + c1))


def _tile_piece(weight: Tensor, area: Area) -> Callable[[], Tensor]:
    return lambda: read(weight, area).view(1, -1)


def _tiled(x: Tensor, rows: int, columns: int) -> Tensor:
    n, k = x.shape
    if n % rows or k % columns:
        x = pad(x, (0, -k % columns, 0, -n % rows))
    tiles = x.view(-1, rows, x.shape[1] // columns, columns).transpose(1, 2)
    return tiles.reshape(-1, rows * columns)


def spread(take: Callable[[tuple[slice, ...]], Tensor], block: Block, n: int, k: int, area: Area) -> Tensor:
    """The per-block values that belong to the weights of an area, to broadcast against the weights.

    Args:
        take: gives the values of a part of the grid, in the shape of that part.
        block: which weights share a value.
        n: rows of the weight.
        k: columns of the weight.
        area: from `areas`, of the same `[n, k]`.

    Returns:
        `[rows, c, 1]`, to broadcast against the area viewed as `[rows, c, -1]`; c divides the columns of the area.
    """
    r0, r1, c0, c1 = area
    if block.flat:
        return _spread_flat(take, block.columns, k, area)
    rows, columns = block.rows or n, block.columns or k
    band, tile = r0 // rows, c0 // columns
    values = take((slice(band, math.ceil(r1 / rows)), slice(tile, math.ceil(c1 / columns))))
    if rows > 1:
        values = values.index_select(0, _owners(r0, r1, rows, values.device))
    if values.shape[1] > 1 and (c0 % columns or c1 % columns):
        values = values.index_select(1, _owners(c0, c1, columns, values.device))
    return values.unsqueeze(-1)


def _spread_flat(take: Callable[[tuple[slice, ...]], Tensor], columns: int, k: int, area: Area) -> Tensor:
    r0, r1, c0, c1 = area
    start, stop = r0 * k + c0, (r1 - 1) * k + c1
    values = take((slice(start // columns, math.ceil(stop / columns)),))
    if start % columns or (c1 - c0) % columns:
        values = values.index_select(0, _owners(start, stop, columns, values.device))
    return values.view(r1 - r0, -1, 1)


def _owners(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, device=device) // size - start // size
