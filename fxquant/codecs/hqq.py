"""HQQ: zeros by half-quadratic optimisation, https://mobiusml.github.io/hqq_blog (Badri and Shaji, 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch, budget
from fxquant.codecs.family import Family
from fxquant.codecs.grid import Grid, Level
from fxquant.codecs.offsets import stored_offsets
from fxquant.codecs.residuals import span, whole_batches
from fxquant.codecs.scales import scale_format
from fxquant.scheme import Element, Scheme

_NORM, _BETA, _ITERATIONS = 0.7, 10.0, 20
_STEEPEST = 1e38
"""The largest inverse of a scale that is finite in float32, or nearly."""


def hqq_problem(scheme: Scheme) -> str | None:
    """Why `hqq` cannot choose the zeros of a scheme, or None."""
    if scheme.zero == "none":
        return f"{scheme} has none: int4-g64-asym, uint4-g64-fzero-fp16 and uint4-g32-bias-fp16, say, have"
    if scheme.outer is not None or scheme.double:
        return f"those of {scheme} are under scales of two levels, and it knows one"
    return None


def hqq(weight: Tensor, scheme: Scheme, family: Family, planes: Mapping[str, Tensor]) -> Grid:
    """Scales that span the range of each block, and zeros that minimise the p-norm of the error, p = 0.7.

    The solver of the hqq library as it has been from the start: it splits the error off by shrinkage and takes the
    mean of what zero each weight asks for, 20 times or until the mean error of the whole weight no longer falls. beta
    is 10 throughout. Unlike the library, which works in half precision on GPUs, this has no bounds for scales. Integer
    zeros are rounded in the end, and the range of their blocks includes 0.

    Args:
        weight: `[N, K]`.
        scheme: one for which `hqq_problem` is None.
        family: of its element.
        planes: of the scheme; scales, and float zeros or biases, are written to.
    """
    solver = _Solver(weight, scheme)
    solver.solve()
    steepness, zero, element = solver.steepness, solver.zero, scheme.spec
    if scheme.zero == "int":
        fmt = scale_format(scheme, family.floor)
        planes["scales"].copy_(fmt.store(steepness.reciprocal(), ()))
        codes = zero.round_().clamp_(0, element.high - element.low)
        stored = codes + element.low if element.dtype is not None else codes
        return Grid(scheme, Level(fmt, planes["scales"]), stored.to(element.dtype or torch.uint8))
    formats = stored_offsets(scheme, family)
    planes["scales"].copy_(formats.scales.store(steepness.reciprocal(), ()))
    zero.add_(element.low)
    name = "zeros" if formats.as_zeros else "biases"
    planes[name].copy_(formats.offsets.store(zero if formats.as_zeros else -zero / steepness, ()))
    return Grid(scheme, Level(formats.scales, planes["scales"]), offsets=Level(formats.offsets, planes[name]))


class _Solver:
    """Codes count from 0 here."""

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        self._weight, self._scheme = weight, scheme
        grid = scheme.block.grid(*weight.shape)
        self.steepness = torch.empty(grid, dtype=torch.float32, device=weight.device)
        self.zero = torch.empty_like(self.steepness)
        for batch in self._batches():
            steepness, zero = _range(batch, scheme.spec, with_zero=scheme.zero == "int")
            self.steepness[batch.at] = steepness.view(self.steepness[batch.at].shape)
            self.zero[batch.at] = zero.view(self.steepness[batch.at].shape)

    def _batches(self) -> Iterator[Batch]:
        return whole_batches(self._weight, self._scheme.block, budget(self._weight.device))

    def solve(self) -> None:
        """Move the zeros until the error stops falling."""
        least = None
        for _ in range(_ITERATIONS):
            error = torch.zeros((), dtype=torch.float64, device=self._weight.device)
            for batch in self._batches():
                error += self._moved(batch)
            if least is not None and not error < least:
                return
            least = error

    def _moved(self, batch: Batch) -> Tensor:
        """Move the zeros of a batch; the sum of the magnitudes of the errors that they had."""
        shape = self.zero[batch.at].shape
        steepness, zero = (grid[batch.at].reshape(-1, 1) for grid in (self.steepness, self.zero))
        wanted, error, count = [], torch.zeros((), dtype=torch.float64, device=zero.device), 0
        for piece in batch.pieces:
            x = piece()
            codes = (x * steepness).add_(zero).round_().clamp_(0, self._scheme.spec.high - self._scheme.spec.low)
            rest = x - (codes - zero).div_(steepness)
            error += rest.abs().sum(dtype=torch.float64)
            wanted.append(codes.sub_((x - _shrunk(rest)).mul_(steepness)).sum(1))
            count += x.shape[1]
        self.zero[batch.at] = (torch.stack(wanted).sum(0) / count).view(shape)
        return error


def _range(batch: Batch, element: Element, with_zero: bool) -> tuple[Tensor, Tensor]:
    """The inverse of the scale that spans each block, and the zero for its smallest weight."""
    low, high = span(batch)
    if with_zero:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    steepness = ((element.high - element.low) / (high - low)).clamp_(max=_STEEPEST)
    steepness = torch.where(high > low, steepness, 1.0)
    return steepness, -low * steepness


def _shrunk(x: Tensor) -> Tensor:
    """The generalised soft threshold for the p-norm."""
    size = x.abs()
    return size.sub_(size.pow(_NORM - 1).mul_(1 / _BETA)).clamp_min_(0).mul_(x.sign())
