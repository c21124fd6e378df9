"""What codes leave over: sums per block, from which the best scale and bias for these codes follow in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch, batches
from fxquant.codecs.family import Family, reciprocal
from fxquant.scheme import Block


@dataclass(frozen=True)
class Sums:
    """Over the weights of each block, float32 `[blocks]`: of values q, and of errors e = w - bias - scale * q."""

    count: int
    qq: Tensor
    qe: Tensor
    ee: Tensor
    q: Tensor
    e: Tensor

    def step(self, highest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What to add to scale and bias for the least squared error with these codes.

        Args:
            highest: what may be added to the bias at most.
        """
        spread = self.count * self.qq - self.q.square()
        slope = (self.count * self.qe - self.q * self.e) / spread
        slope = torch.where(spread > 1e-6 * self.count * self.qq, slope, 0.0)
        bias = (self.e - slope * self.q) / self.count
        if highest is None:
            return slope, bias
        bias = torch.minimum(bias, highest)
        scale = (self.qe - bias * self.q) / self.qq
        return torch.where(self.qq > 0, scale, 0.0), bias

    def after(self, scale: Tensor, bias: Tensor) -> Tensor:
        """The squared error with these codes once so much has been added to scale and bias."""
        error = self.ee + scale.square() * self.qq + self.count * bias.square()
        return (error - 2 * (scale * self.qe + bias * self.e - scale * bias * self.q)).clamp_(min=0)


class Residuals:
    """The weights of a batch in units, and the sums that scales (and biases, or zeros) leave of them.

    Weights lie transposed here, `[weights, blocks]`: what belongs to blocks is then added, multiplied and summed along
    whole vectors, however small the blocks are.
    """

    def __init__(self, family: Family, batch: Batch, unit: Tensor) -> None:
        """`unit`, `[blocks]`: all scales and biases here are multiples of it, so that squares stay finite."""
        self._family, self._pieces = family, batch.pieces
        self._inverse = reciprocal(unit)
        self._loaded = self._transposed(batch.pieces[0]) if len(batch.pieces) == 1 else None
        self._scratch: list[Tensor] = []

    def _transposed(self, piece: Callable[[], Tensor]) -> Tensor:
        return (piece() * self._inverse.unsqueeze(1)).t().contiguous()

    def weights(self) -> Iterator[Tensor]:
        """The pieces, float32 `[weights of the piece, blocks]`."""
        if self._loaded is not None:
            yield self._loaded
        else:
            yield from (self._transposed(piece) for piece in self._pieces)

    def sums(self, scale: Tensor, bias: Tensor | None = None, zero: Tensor | None = None) -> Sums:
        """With the codes nearest to the weights at this scale, `[blocks]`, and bias or zero."""
        none, parts = scale.new_zeros(()), []
        for x in self.weights():
            q, e, spare = self._rounded(x, scale, bias, zero)
            qq, qe, ee = (torch.mul(a, b, out=spare).sum(0) for a, b in ((q, q), (q, e), (e, e)))
            parts.append(Sums(len(x), qq, qe, ee, *((none, none) if bias is None else (q.sum(0), e.sum(0)))))
        return functools.reduce(_add, parts)

    def error(self, scale: Tensor, bias: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """The squared error of each block with these codes."""
        rounded = (self._rounded(x, scale, bias, zero) for x in self.weights())
        return functools.reduce(torch.add, [torch.mul(e, e, out=spare).sum(0) for _, e, spare in rounded])

    def mean_error(self, scale: Tensor, bias: Tensor) -> Tensor:
        """The mean error of each block with these codes: what is best added to the bias."""
        sums = [(self._rounded(x, scale, bias, None)[1].sum(0), len(x)) for x in self.weights()]
        return functools.reduce(torch.add, (total for total, _ in sums)) / sum(count for _, count in sums)

    def mean(self) -> Tensor:
        """Of the weights of each block."""
        sums = [(x.sum(0), len(x)) for x in self.weights()]
        return functools.reduce(torch.add, (total for total, _ in sums)) / sum(count for _, count in sums)

    def _rounded(
        self, x: Tensor, scale: Tensor, bias: Tensor | None, zero: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values and errors of weights, and memory to write to."""
        if not self._scratch or self._scratch[0].shape != x.shape:
            # Fresh memory for every product would cost more than the product.
            self._scratch = [torch.empty_like(x) for _ in range(3)]
        t, q, e = self._scratch
        shifted = x if bias is None else torch.sub(x, bias, out=e)
        torch.mul(shifted, reciprocal(scale), out=t)
        # For `project`, only what has no bias needs memory of its own.
        self._family.project(t, zero, q, e if bias is None else t)
        return q, torch.sub(shifted, torch.mul(q, scale, out=t), out=e), t


def _add(a: Sums, b: Sums) -> Sums:
    return Sums(a.count + b.count, a.qq + b.qq, a.qe + b.qe, a.ee + b.ee, a.q + b.q, a.e + b.e)


def whole_batches(weight: Tensor, block: Block, size: int) -> Iterator[Batch]:
    """As `batches`, with blocks on the edge of the matrix as they are.

    Filled up with zeros they would have the wrong range wherever it need not include 0.
    """
    n, k = weight.shape
    if block.flat or not n * k:
        yield from batches(weight, block, size)
        return
    rows, columns = min(block.rows or n, n), min(block.columns or k, k)
    for r0, r1 in ((0, n - n % rows), (n - n % rows, n)):
        for c0, c1 in ((0, k - k % columns), (k - k % columns, k)):
            first = (r0 // rows, c0 // columns)
            for batch in batches(weight[r0:r1, c0:c1], Block(rows, columns), size):
                at = tuple(slice(p.start + f, p.stop + f) for p, f in zip(batch.at, first, strict=True))
                yield replace(batch, at=at)


def span(batch: Batch) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each block."""
    lows, highs = zip(*((x.amin(1), x.amax(1)) for x in (piece() for piece in batch.pieces)), strict=True)
    return functools.reduce(torch.minimum, lows), functools.reduce(torch.maximum, highs)
