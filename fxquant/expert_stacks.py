"""Which weights of a layer of experts are stored together: those of one scheme that one call of the op can multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant.errors import ModelError, SchemeError
from fxquant.expert_layouts import ExpertsLayout, Projection, stacked_weight
from fxquant.expert_matmul import PLAIN
from fxquant.plane_stacks import by_rows
from fxquant.scheme import PlaneSpec, Scheme

Schemes = Mapping[tuple[int, str], Scheme | None]
"""Expert and projection: the scheme; None, or no entry, for a matrix that stays as it is."""


@dataclass(frozen=True)
class Stack:
    """The weights `[S, n, k]` of some experts, under one scheme."""

    name: str
    """What its tensors are called, followed by the name of a plane: `gate_up_proj_codes`."""
    parameter: str
    """The parameter of the replaced module that the weights come from."""
    projections: tuple[Projection, ...]
    """Which parts of it: one, or all, their rows in the order of the parameter."""
    scheme: str
    """The spelling, or `PLAIN` for weights that stay as they are."""
    n: int
    k: int
    experts: tuple[int, ...]
    planes: tuple[str, ...]
    """Names of the planes, in the order in which ops take them."""
    whole: bool
    """Nothing of the parameter is quantized, and it is kept."""

    @property
    def part(self) -> int:
        """Rows of one matrix."""
        return self.n // len(self.projections)

    def specs(self, rows: int, dtype: torch.dtype) -> dict[str, PlaneSpec]:
        """The planes of a weight with so many rows; `weight`, of this dtype, for one that stays as it is."""
        if self.scheme == PLAIN:
            return {"weight": PlaneSpec((rows, self.k), dtype)}
        return Scheme.parse(self.scheme).planes(rows, self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes; 0 for weights that stay as they are."""
        return 0 if self.scheme == PLAIN else len(self.experts) * Scheme.parse(self.scheme).nbytes(self.n, self.k)

    def tensor(self, plane: str) -> str:
        """Name of the tensor that holds a plane of all its weights."""
        return f"{self.name}_{plane}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that are its own: planes, and which experts they belong to."""
        return tuple(self.tensor(name) for name in (*self.planes, "experts"))

    def rows(self, projection: str) -> slice | None:
        """Which rows of each weight are those of a projection; None: all."""
        if len(self.projections) == 1:
            return None
        return next(p for p in self.projections if p.name == projection).rows(self.n)

    def bias_rows(self, n: int) -> slice:
        """Which of the n rows of the parameter, and so columns of its bias, are those of the weights."""
        return self.projections[0].rows(n) if len(self.projections) == 1 else slice(n)

    def of_one(self, plane: Tensor, projection: str, e: int) -> Tensor:
        """The part of a stacked plane that belongs to one matrix; a view. Row by row, where there are more parts."""
        own, rows = plane[self.experts.index(e)], self.rows(projection)
        return own if rows is None else own.view(self.n, own.numel() // self.n)[rows]


def stacks_of(module: nn.Module, layout: ExpertsLayout, schemes: Schemes) -> tuple[Stack, ...]:
    """The stacks that hold the experts of `module` under these schemes.

    Raises:
        ModelError: schemes are given for experts or projections that there are not.
        SchemeError: a scheme cannot hold a matrix.
    """
    known = {(e, p.name) for e in range(layout.experts) for p in layout.projections}
    if strange := sorted(schemes.keys() - known):
        raise ModelError(
            f"schemes are given for matrices that these experts do not have: {strange[:5]}\n"
            f"  experts: 0 to {layout.experts - 1}, projections: {', '.join(p.name for p in layout.projections)}"
        )
    parameters = dict.fromkeys(p.parameter for p in layout.projections)
    return tuple(stack for name in parameters for stack in _of_parameter(module, layout, name, schemes))


def _of_parameter(module: nn.Module, layout: ExpertsLayout, parameter: str, schemes: Schemes) -> list[Stack]:
    parts, (_, n, k) = layout.parts(parameter), stacked_weight(module, layout, parameter).shape
    groups: dict[tuple[tuple[Projection, ...], Scheme | None], list[int]] = {}
    for e in range(layout.experts):
        own = [schemes.get((e, p.name)) for p in parts]
        for part, scheme in zip(parts, own, strict=True):
            if scheme and (misfit := scheme.misfit(n // len(parts), k)):
                raise SchemeError(f"{scheme} cannot hold {e}.{part.name}, {[n // len(parts), k]}: {misfit}")
        if len(set(own)) == 1 and (own[0] is None or len(parts) == 1 or by_rows(own[0], n // len(parts), k)):
            groups.setdefault((parts, own[0]), []).append(e)
            continue
        for part, scheme in zip(parts, own, strict=True):
            groups.setdefault(((part,), scheme), []).append(e)
    stacks = []
    for (held, scheme), experts in groups.items():
        base = parameter if len(held) > 1 else held[0].name
        alike = [key for key in groups if key[0] == held]
        name = base if len(alike) == 1 else f"{base}_{alike.index((held, scheme))}"
        rows = n // len(parts) * len(held)
        whole = list(groups) == [(parts, None)]
        spelling, planes = (str(scheme), scheme.planes(rows, k)) if scheme else (PLAIN, ("weight",))
        stacks.append(Stack(name, parameter, held, spelling, rows, k, tuple(experts), tuple(planes), whole))
    return stacks


def joined(columns: Sequence[Tensor], parts: Sequence[Projection]) -> Tensor:
    """The results of all parts of a parameter, `[..., n]` each, in the order of the parameter's rows."""
    if len(columns) == 1:
        return columns[0]
    return torch.stack(tuple(columns), -1).flatten(-2) if parts[0].interleaved else torch.cat(tuple(columns), -1)


def pair_of(stacks: Sequence[Stack], layout: ExpertsLayout) -> tuple[Stack, Stack] | None:
    """The stack of gate and up, one below the other, and that of down, where these hold all experts, without a bias."""
    if len(stacks) != 2 or any(p.bias for p in layout.projections) or any(s.scheme == PLAIN for s in stacks):
        return None
    first, second = stacks
    names = [tuple(p.name for p in stack.projections) for stack in stacks]
    gated = names == [("gate_proj", "up_proj"), ("down_proj",)] and not any(p.interleaved for p in first.projections)
    return (first, second) if gated and second.n == first.k and 2 * second.k == first.n else None
