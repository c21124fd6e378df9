"""Where calls of a graph may not be moved together: writes to memory and switches of a mode stand between them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxquant.inductor import OpOverload
from fxquant.listing import op_name

_WRITING_OPERATORS = frozenset(
    {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"}
)
_HARMLESS = ("_assert", "sym_constrain", "assert")


def epochs(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, int]]:
    """Every node with the number of memory writes and mode switches that stand before it.

    Calls of one epoch that read the same nodes compute the same wherever in it they stand.
    """
    epoch, numbered = 0, []
    for node in nodes:
        epoch += _is_border(node)
        numbered.append((node, epoch))
    return numbered


def _is_border(node: fx.Node) -> bool:
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or name.startswith(_HARMLESS):
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _WRITING_OPERATORS
    writes = name.endswith("_") and not name.endswith("__")
    return writes or bool(node.kwargs.get("inplace")) or "out" in node.kwargs or node.is_impure()
