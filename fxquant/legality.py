"""What may stand in a graph between two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import FxquantError
from fxquant.inductor import OpOverload, example_size, pytree
from fxquant.listing import op_name, value
from fxquant.ops import ABI


def violations(gm: fx.GraphModule) -> list[str]:
    """What is wrong with the graph of `gm`, one sentence each; empty for a legal graph.

    Legal means: well-formed for torch.fx; every module, parameter and buffer that it names exists; every op of fxquant
    gets all its arguments by position and has this version's ABI, and takes them: planes that fit their scheme, the
    rows and the input, ids and codes that belong to theirs. Of an op that reads what has no fake value, only count and
    ABI are looked at.
    """
    found = []
    unknown: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and not _exists(gm, str(node.target), torch.nn.Module):
            found.append(f"{node.name} calls {node.target!r}, which is no submodule")
        elif node.op == "get_attr" and not _exists(gm, str(node.target), object):
            found.append(f"{node.name} reads {node.target!r}, which does not exist")
        elif op_name(node).startswith("fxquant."):
            problem = _call_problem(node, unknown)
            found += [f"{node.name}: {problem}"] if problem else []
    if not found:
        try:
            gm.graph.lint()
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    return found


def _exists(gm: fx.GraphModule, target: str, kind: type) -> bool:
    holder: Any = gm
    for part in target.split("."):
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return isinstance(holder, kind)


def _call_problem(node: fx.Node, unknown: dict[str, int]) -> str | None:
    op: Any = node.target if isinstance(node.target, OpOverload) else node.target.default  # type: ignore[union-attr]
    names = [argument.name for argument in op._schema.arguments]
    if len(node.args) != len(names) or node.kwargs:
        named = f", and {len(node.kwargs)} by name" if node.kwargs else ""
        return f"{op._schema.name} takes {len(names)} positional arguments, it has {len(node.args)}{named}"
    if "abi" in names and (abi := node.args[names.index("abi")]) != ABI:
        return f"its ABI number is {abi}, this version's is {ABI}"
    if any(value(source) is None for source in node.all_input_nodes):
        return None

    def number(size: int | torch.SymInt) -> int:
        # What depends on data gets some number, and the same wherever it is said in the same words.
        known = example_size(size)
        return unknown.setdefault(str(size), len(unknown) + 2) if known is None else known

    def like(fake: Any) -> Any:
        """A tensor on the meta device, of the sizes that it was captured with: symbols would add guards."""
        if isinstance(fake, Tensor):
            return torch.empty([number(size) for size in fake.shape], dtype=fake.dtype, device="meta")
        return number(fake) if isinstance(fake, torch.SymInt) else fake

    try:
        with torch.no_grad():
            op(*fx.map_arg(node.args, lambda source: pytree.tree_map(like, value(source))))
    except Exception as error:  # an op may fail in any way
        kind = "" if isinstance(error, FxquantError) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split())
    return None
