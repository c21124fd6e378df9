"""Patterns over FX graphs: what a local pass looks for.

    Op("mul", Op("silu", "gate"), "up")         matches silu(gate) * up, in either order
    Module(nn.Linear, "x")                      matches a call of a linear module

Ops are named without a dialect (see `listing.op_name`), so one pattern serves the captured graph, which holds aten ops,
and the graph that `torch.compile` sees, which holds torch functions and tensor methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxquant.listing import op_name

_COMMUTATIVE = frozenset({"add", "mul"})


@dataclass(frozen=True)
class Op:
    """A call of `name`. Arguments of the node that the pattern does not mention must be None or False."""

    name: str
    args: tuple[Any, ...]
    """An `Op` or `Module`; a string that binds whatever stands there; or a constant that must stand there."""
    kwargs: tuple[tuple[str, Any], ...]
    """Constants that must stand at keyword arguments."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", tuple(sorted(kwargs.items())))


@dataclass(frozen=True)
class Module:
    """A call of a submodule of class `kind` (or a subclass); the arguments are all there are."""

    kind: type[nn.Module]
    args: tuple[Any, ...]

    def __init__(self, kind: type[nn.Module], *args: Any) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "args", args)


Pattern = Op | Module


@dataclass(frozen=True)
class Match:
    """Where a pattern was found."""

    root: fx.Node
    """The node whose value the pattern describes."""
    nodes: tuple[fx.Node, ...]
    """All nodes that the pattern names, the root first."""
    bound: Mapping[str, Any]
    """What stands at each string of the pattern."""

    def __getitem__(self, name: str) -> Any:
        """What stands at the string `name` of the pattern."""
        return self.bound[name]


def match(pattern: Pattern, node: fx.Node, gm: fx.GraphModule) -> Match | None:
    """The first way in which `node` is the root of `pattern`, or None."""
    for nodes, bound in _ways(pattern, node, gm, {}):
        return Match(node, nodes, bound)
    return None


_Way = tuple[tuple[fx.Node, ...], dict[str, Any]]


def _ways(pattern: Any, node: Any, gm: fx.GraphModule, bound: dict[str, Any]) -> Iterator[_Way]:
    if isinstance(pattern, str):
        if pattern not in bound or bound[pattern] is node:
            yield (), {**bound, pattern: node}
    elif isinstance(pattern, (Op, Module)):
        if isinstance(node, fx.Node) and _calls(pattern, node, gm):
            for order in _orders(pattern, node):
                for nodes, new in _all(pattern.args, order, gm, bound):
                    yield (node, *nodes), new
    elif not isinstance(node, fx.Node) and type(pattern) is type(node) and pattern == node:
        yield (), bound


def _all(
    patterns: tuple[Any, ...], values: tuple[Any, ...], gm: fx.GraphModule, bound: dict[str, Any]
) -> Iterator[_Way]:
    if not patterns:
        yield (), bound
        return
    for nodes, new in _ways(patterns[0], values[0], gm, bound):
        for rest, final in _all(patterns[1:], values[1:], gm, new):
            yield (*nodes, *rest), final


def _calls(pattern: Op | Module, node: fx.Node, gm: fx.GraphModule) -> bool:
    if isinstance(pattern, Op):
        wanted, there = dict(pattern.kwargs), dict(node.kwargs)
        # F.silu(x, inplace=False) and aten.silu(x) are one thing, but add(x, y, alpha=2) is not add(x, y).
        rest = [*node.args[len(pattern.args) :], *(v for k, v in there.items() if k not in wanted)]
        return (
            op_name(node) == pattern.name
            and len(node.args) >= len(pattern.args)
            and all(there.get(k) == v for k, v in wanted.items())
            and all(v is None or v is False for v in rest)
        )
    return (
        node.op == "call_module"
        and len(node.args) == len(pattern.args)
        and isinstance(gm.get_submodule(str(node.target)), pattern.kind)
    )


def _orders(pattern: Op | Module, node: fx.Node) -> Iterator[tuple[Any, ...]]:
    args = tuple(node.args[: len(pattern.args)])
    yield args
    if isinstance(pattern, Op) and pattern.name in _COMMUTATIVE and len(args) == 2:
        yield args[::-1]
