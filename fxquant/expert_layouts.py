"""Where each matrix of each expert lies in the stacked parameters of a module: data, and views by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.expert_forwards import by_convention


@dataclass(frozen=True)
class Projection:
    """One kind of matrix that every expert has, and where it lies in a stacked parameter."""

    name: str
    """As checkpoints on the hub call it: `gate_proj`, `up_proj`, `down_proj`."""
    parameter: str
    """Name of the parameter within the experts module: `[E, N, K]`, or `[E * N, K]` with the experts one below the
    other; dotted where a child module holds it."""
    transposed: bool = False
    """The parameter is `[E, K, N]`."""
    part: int = 0
    """Which of the equal parts of the parameter's N rows."""
    parts: int = 1
    interleaved: bool = False
    """Parts alternate row by row; otherwise they stand one below the other."""
    bias: str | None = None
    """Name of a parameter `[E, N]`, whose columns belong together as the rows of the weight do."""

    def rows(self, n: int) -> slice:
        """Which of the parameter's n rows are those of the projection."""
        if self.interleaved:
            return slice(self.part, None, self.parts)
        return slice(n // self.parts * self.part, n // self.parts * (self.part + 1))


Forward = Callable[..., Tensor]
"""`forward(experts, *args)`, see `fxquant.expert_forwards`."""


@dataclass(frozen=True)
class ExpertsLayout:
    """Where the matrices of all experts of one module lie, and what is computed with them."""

    experts: int
    """How many there are."""
    projections: tuple[Projection, ...]
    """In the order in which they are used; parts of one parameter stand together."""
    forward: Forward = by_convention

    def __contains__(self, name: str) -> bool:
        """Whether there is a projection of this name."""
        return any(p.name == name for p in self.projections)

    def projection(self, name: str) -> Projection:
        """The projection of this name.

        Raises:
            ModelError: there is none.
        """
        for found in self.projections:
            if found.name == name:
                return found
        raise ModelError(
            f"experts have no projection {name!r}\n  they have: {', '.join(p.name for p in self.projections)}"
        )

    def parts(self, parameter: str) -> tuple[Projection, ...]:
        """The projections that a parameter holds, in order of their parts; none where there is no such parameter."""
        return tuple(sorted((p for p in self.projections if p.parameter == parameter), key=lambda p: p.part))


def expert_name(module_name: str, e: int, projection: str) -> str:
    """The name of one matrix of one expert: `<module>.<e>.<projection>`."""
    return f"{module_name}.{e}.{projection}".lstrip(".")


def expert_weight(module: nn.Module, layout: ExpertsLayout, projection: str, e: int) -> Tensor:
    """The `[N, K]` matrix of one expert: a view of the module's own parameter, never a copy."""
    found = layout.projection(projection)
    matrix = stacked_weight(module, layout, found.parameter)[e]
    return matrix[found.rows(matrix.shape[0])]


def expert_bias(module: nn.Module, layout: ExpertsLayout, projection: str, e: int) -> Tensor | None:
    """The `[N]` bias of one matrix of one expert, a view; None where there is none."""
    found = layout.projection(projection)
    if found.bias is None:
        return None
    bias = module.get_parameter(found.bias)[e]
    return bias[found.rows(bias.shape[0])]


def stacked_weight(module: nn.Module, layout: ExpertsLayout, parameter: str) -> Tensor:
    """`[E, N, K]`: a parameter with all its parts, as a view."""
    return as_stack(module.get_parameter(parameter), layout, parameter)


def as_stack(tensor: Tensor, layout: ExpertsLayout, parameter: str) -> Tensor:
    """`[E, N, K]`: a tensor that is shaped like a parameter of this name, as a view."""
    stack = tensor.view(layout.experts, -1, tensor.shape[-1]) if tensor.dim() == 2 else tensor
    stack = stack[: layout.experts]
    return stack.transpose(1, 2) if layout.parts(parameter)[0].transposed else stack
