"""Weights of one shape and scheme whose planes are stacked: each plane with one more dimension in front."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.codecs import dequantize
from fxquant.scheme import TENSOR, Block, Scheme


def dequantize_stack(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The weights `[S, n, k]` that stacked planes hold: of each, what `fxquant.codecs.dequantize` gives, bit by bit.

    Args:
        planes: `[S, ...]` each, as `scheme.planes(n, k)` says behind the first dimension; contiguous ones are faster.
        scheme: what all of them were made under.
        n: rows of one weight.
        k: columns of it.
        dtype: of the result.
    """
    count = planes["codes"].shape[0]
    one = as_one(scheme, n, k, count)
    if one is None:
        each = [dequantize({name: p[i] for name, p in planes.items()}, scheme, n, k, dtype) for i in range(count)]
        return torch.stack(each) if each else planes["codes"].new_empty((0, n, k), dtype=dtype)
    whole = {name: planes[name].reshape(spec.shape) for name, spec in one.planes(count * n, k).items()}
    return dequantize(whole, one, count * n, k, dtype).view(count, n, k)


@functools.lru_cache(maxsize=1024)
def as_one(scheme: Scheme, n: int, k: int, count: int) -> Scheme | None:
    """The scheme of the `[count * n, k]` weight that `count` weights are, one below the other; None if there is none.

    Its planes are the stacked ones, reshaped. An input scale is not among them.
    """
    outer = scheme.outer
    if scheme.double or scheme.columns or scheme.spec.vectors or count == 0 or (scheme.block.flat and outer):
        return None
    blocks = [_within(scheme.block, n, k), _within(outer.block, n, k) if outer else TENSOR]
    if blocks[0] is None or blocks[1] is None:
        return None
    one = replace(scheme, block=blocks[0], outer=replace(outer, block=blocks[1]) if outer else None, activation=None)
    # Fields that are packed across weights, not row by row, may leave the last byte of each weight half full.
    sizes = [[math.prod(s.shape) for s in specs.values()] for specs in (one.planes(n, k), one.planes(count * n, k))]
    return one if [count * size for size in sizes[0]] == sizes[1] else None


def _within(block: Block, n: int, k: int) -> Block | None:
    """The same blocks of weights that stand one below the other; None where a block would reach across."""
    if block.flat:
        return block if n * k % block.columns == 0 else None
    if block == TENSOR:
        return Block(n, 0) if n else None
    return block if n % block.rows == 0 else None


@functools.lru_cache(maxsize=1024)
def by_rows(scheme: Scheme, n: int, k: int) -> bool:
    """Whether row i of every plane holds row i of an `[n, k]` weight, and nothing else matters to it.

    So rows of such planes are planes of the rows. Flat blocks count where each row consists of whole ones, and their
    scales `[n * blocks]` are seen as `[n, blocks]`.
    """
    block, outer = scheme.block, scheme.outer
    own = (block.rows == 1 and (not block.flat or k % block.columns == 0)) and (not outer or outer.block.rows == 1)
    static = scheme.activation is not None and scheme.activation.static
    packed = block.flat and scheme.zero != "none"
    return own and not (
        scheme.double or scheme.columns or scheme.spec.vectors or static or packed or (block.flat and outer)
    )
