"""The planes of one weight that a format is to hold, looked at before they are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.checkpoints.source import E8M0, FLOATS
from fxquant.errors import CheckpointError
from fxquant.scheme import SCALE_TYPES, TENSOR, Scheme

Obstacles = Callable[[Scheme, int, int], Sequence[str]]
"""Takes a scheme, N and K; gives what keeps a format from holding such a weight exactly: what it has instead."""
Written = dict[str, Tensor]
"""Tensors by their names behind the prefix of the module: what every `tensors_of_...` gives."""

EXACT_IN_FP32 = (*FLOATS.values(), "e8m0", "e4m3")
"""Types of scales, all of whose values are float32's too."""


@dataclass(frozen=True)
class Target:
    """Planes that are those of their scheme."""

    format: str
    """What to call the format in errors."""
    scheme: Scheme
    planes: Mapping[str, Tensor]
    n: int
    k: int

    def check(self, obstacles: Obstacles) -> None:
        """Refuse what the format does not hold exactly, and planes that are not those of the scheme.

        Raises:
            CheckpointError: by either.
        """
        found = obstacles(self.scheme, self.n, self.k)
        if found:
            fact = f"no {self.scheme} weight, for the format has {'; '.join(found)}"
            raise self.error(fact, "quantize the weight to a scheme that it holds")
        specs = self.scheme.planes(self.n, self.k)
        expected = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        given = {name: (tuple(plane.shape), plane.dtype) for name, plane in self.planes.items()}
        if given != expected:
            raise self.error(f"a {self.scheme} weight has the planes {expected}, and these are {given}", "give those")

    def error(self, fact: str, remedy: str) -> CheckpointError:
        """An error about this weight, to be raised."""
        return CheckpointError(f"{self.format} weight of shape [N={self.n}, K={self.k}]: {fact}\n  {remedy}")

    @property
    def group(self) -> int:
        """As `group_of`, of a scheme that has one."""
        group = group_of(self.scheme, self.n, self.k)
        assert group is not None
        return group

    def float_scales(self) -> Tensor:
        """The plane of scales in a float that torch multiplies with: its own, or float32."""
        plane, kind = self.planes["scales"], SCALE_TYPES[self.scheme.scale]
        pattern = E8M0 if kind.kind == "power" else kind.pattern
        return plane if pattern is None else plane.view(pattern).to(torch.float32)

    def scales(self, group: int | None = None) -> Tensor:
        """Scales of single rows, `[N, K / group]`, as floats; None: of the groups that there are."""
        return self.by_row(self.float_scales(), group)

    def by_row(self, grid: Tensor, group: int | None = None) -> Tensor:
        """One number for each group of each row, `[N, K / group]`, of one for each block."""
        block, own = self.scheme.block, self.group
        if block.flat:
            rows = grid.view(self.n, self.k // own)
        else:
            rows = grid.repeat_interleave(block.rows or self.n, 0)[: self.n] if block.rows != 1 else grid
        return rows if group in (None, own) else rows.repeat_interleave(own // (group or own), 1)


def group_of(scheme: Scheme, n: int, k: int) -> int | None:
    """Columns that share a scale, of an `[n, k]` weight of which every row can have scales of its own.

    Blocks of several rows do as well: their scales are repeated. None: blocks that end within a group of others.
    """
    block = scheme.block
    if block == TENSOR or (not block.flat and block.columns == 0):
        return k
    if not block.flat and block.columns >= k:
        return k
    return block.columns if k % block.columns == 0 else None


def natural(target: Target, columns: Tensor) -> Tensor:
    """Columns `[..., K]` in the order of the weight's, of some in that of the planes."""
    perm = target.planes.get("perm")
    return columns if perm is None else columns.index_select(-1, perm.argsort())


def argument_of(values: Tensor, function: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
    """What a function takes to give these values: `guess`, or a neighbour of it; where there is none, `guess`.

    A quotient is rounded, and so the rounded inverse is not always what it came from.

    Args:
        values: float32.
        function: of numbers, one by one.
        guess: float32, its inverse but for the last place.
    """
    found = guess
    for towards in (torch.inf, -torch.inf):
        step = torch.nextafter(guess, torch.full_like(guess, towards))
        found = torch.where((function(found) != values) & (function(step) == values), step, found)
    return found
