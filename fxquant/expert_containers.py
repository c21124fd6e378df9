"""What all containers of experts have in common: they stand for a module of another class, see `expert_forwards`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fxquant.expert_layouts import ExpertsLayout, Projection

_INTERNALS = frozenset(nn.Module().__dict__)
"""Attributes that every nn.Module has: parameters, buffers, hooks, the training flag."""
_HOOKS = frozenset(name for name in _INTERNALS if "hook" in name)
_LEFT_BEHIND = _INTERNALS | {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}
"""What stays with a module, besides: what accelerate sets on it to move its inputs, made anew by
`fxquant.modules.follow_device_hook`, and its compiled call, which would go on to run that very module."""


class ExpertsContainer(nn.Module):
    """Stands for experts of class `origin`: same arguments, result, attributes, hooks; the weights are held otherwise.

    A subclass gives `project`, and holds what that needs.

    Attributes:
        origin: class of the module that this one stands for.
        origin_members: its constants, methods and properties, with what they are; these the container has too.
        layout: where that module's parameters hold the experts, and what is computed with them.
        argument_names: of that class's forward.
        stack_shapes: of the parameters that are not held as such any more, by their names in that module.
    """

    origin: type[nn.Module]
    layout: ExpertsLayout
    origin_members: dict[str, str]
    argument_names: tuple[str, ...]
    stack_shapes: dict[str, tuple[int, ...]]

    def __init__(self, module: nn.Module, layout: ExpertsLayout) -> None:
        """Take over everything of `module` but the parameters that hold the experts."""
        super().__init__()
        held = held_parameters(layout)
        take_over(self, module, held)
        self.origin, self.layout = type(module), layout
        self.origin_members = dict(_members(type(module)))
        self.argument_names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self.stack_shapes = {name: tuple(module.get_parameter(name).shape) for name in held}

    def project(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        """One projection, or all that share a parameter, of the experts of each token: see `expert_forwards`.

        Args:
            name: of a projection, or of a parameter.
            x: `[T, K]`, one row for all slots of a token, or `[T, k, K]`.
            ids: integers `[T, k]`; those below 0 and beyond the experts name none.

        Returns:
            `[T, k, N]`, zeros where an id names no expert.
        """
        raise NotImplementedError(f"{type(self).__name__} needs `project`")

    def gated(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """What `expert_forwards.by_convention` gives, by a shorter way; None, where there is none for these."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `origin` computes, for the arguments that its forward takes.

        Raises:
            TypeError: they are not those arguments.
        """
        names = self.argument_names[len(args) :]
        if set(names) != set(kwargs):
            raise TypeError(
                f"{self.origin.__name__} takes {', '.join(self.argument_names)}; got {len(args)} positional arguments"
                + "".join(f", {name}" for name in kwargs)
            )
        return self.layout.forward(self, *args, *(kwargs[name] for name in names))

    def matrix_shape(self, projection: Projection) -> tuple[int, int]:
        """`(N, K)` of one matrix of a projection."""
        *first, rows, columns = self.stack_shapes[projection.parameter]
        rows = rows if first else rows // self.layout.experts
        n, k = (columns, rows) if projection.transposed else (rows, columns)
        return n // projection.parts, k

    def __getattr__(self, name: str) -> Any:
        """An attribute of the class that this container stands for, where it has none of that name itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("origin_members", {}).get(name)
            if kind is None:
                raise
        found = getattr(self.origin, name)
        if kind == "method":
            return functools.partial(found, self)  # Dynamo makes no bound methods
        return found.fget(self) if kind == "property" else found

    def restored(self) -> nn.Module:
        """A module of class `origin` with everything but the parameters in `stack_shapes`."""
        module = self.origin.__new__(self.origin)
        nn.Module.__init__(module)
        take_over(module, self, self.stack_shapes)
        for name in self.own_names():
            module.__dict__.pop(name, None)
            module._modules.pop(name, None)
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        return module

    def own_names(self) -> set[str]:
        """Names of attributes, children and buffers that are the container's own."""
        return {"origin", "layout", "origin_members", "argument_names", "stack_shapes"}


def _members(origin: type[nn.Module]) -> Iterator[tuple[str, str]]:
    """What a class has beyond any module. Told apart here since not every Dynamo sees a static method as one."""
    for base in reversed(origin.__mro__[: origin.__mro__.index(nn.Module)]):
        for name, member in vars(base).items():
            if not name.startswith("__"):
                kinds = {"method": isinstance(member, FunctionType), "property": isinstance(member, property)}
                yield name, next((kind for kind, is_it in kinds.items() if is_it), "value")


def held_parameters(layout: ExpertsLayout) -> tuple[str, ...]:
    """Names of the parameters that hold the matrices and biases of experts, each once."""
    names = (name for p in layout.projections for name in (p.parameter, p.bias) if name)
    return tuple(dict.fromkeys(names))


def take_over(new: nn.Module, old: nn.Module, without: Collection[str] = ()) -> None:
    """Give `new` everything that `old` has: attributes, hooks, training flag, parameters, buffers and children.

    Hooks are the same dictionaries, so that handles still remove them. What accelerate sets is left out.

    Args:
        new: a module that has nothing yet.
        old: stays as it is.
        without: names of parameters to leave out; a child that holds such a one is copied, without its parameter.
    """
    for name, value in vars(old).items():
        if name in _HOOKS or name not in _LEFT_BEHIND:
            vars(new)[name] = value
    new.training = old.training
    new._parameters = {name: p for name, p in old._parameters.items() if name not in without}
    new._buffers, new._non_persistent_buffers_set = dict(old._buffers), set(old._non_persistent_buffers_set)
    for name, child in old._modules.items():
        inside = [held.removeprefix(f"{name}.") for held in without if held.startswith(f"{name}.")]
        new._modules[name] = child if child is None or not inside else _copied(child, inside)


def _copied(module: nn.Module, without: Collection[str]) -> nn.Module:
    new = type(module).__new__(type(module))
    nn.Module.__init__(new)
    take_over(new, module, without)
    return new
