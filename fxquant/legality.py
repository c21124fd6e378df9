"""What may stand in a graph between two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.errors import SchemeError
from fxquant.listing import op_name, value
from fxquant.ops import ABI
from fxquant.scheme import Scheme

_OPS = {"fxquant.linear": 6, "fxquant.linear_on_codes": 8}
"""Ops on the planes of weights, with the number of their arguments; planes and what follows come last."""


def violations(gm: fx.GraphModule) -> list[str]:
    """What is wrong with the graph of `gm`, one sentence each; empty for a legal graph.

    Legal means: well-formed for torch.fx; every module, parameter and buffer that it names exists; every
    `fxquant::linear` and `fxquant::linear_on_codes` has planes that fit its scheme, its rows and its input.
    """
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and not _exists(gm, str(node.target), torch.nn.Module):
            found.append(f"{node.name} calls {node.target!r}, which is no submodule")
        elif node.op == "get_attr" and not _exists(gm, str(node.target), object):
            found.append(f"{node.name} reads {node.target!r}, which does not exist")
        elif op_name(node) in _OPS:
            problem = _linear_problem(node, op_name(node))
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


def _linear_problem(node: fx.Node, op: str) -> str | None:
    count = _OPS[op]
    if len(node.args) != count or node.kwargs:
        return f"{op.replace('.', '::')} takes {count} positional arguments, it has {len(node.args)}"
    x, (planes, biases, spelling, rows, abi) = node.args[0], node.args[-5:]
    assert isinstance(planes, (list, tuple))
    assert isinstance(biases, (list, tuple))
    assert isinstance(rows, (list, tuple))
    if abi != ABI:
        return f"its ABI number is {abi}, this version's is {ABI}"
    try:
        scheme = Scheme.parse(str(spelling))
    except SchemeError as error:
        return str(error)
    if len(biases) not in (0, len(rows)):
        return f"{len(biases)} biases for {len(rows)} weights"
    fake = value(x) if isinstance(x, fx.Node) else None
    k = fake.shape[-1] if isinstance(fake, torch.Tensor) and fake.ndim else None
    if not isinstance(k, int):
        return None
    wanted = [spec.shape for n in rows if isinstance(n, int) for spec in scheme.planes(n, k).values()]
    if len(planes) != len(wanted):
        return f"{len(planes)} planes for {len(rows)} weights in {spelling}, which take {len(wanted)}"
    shapes = [
        tuple(v.shape) if isinstance(v := value(p), torch.Tensor) else None for p in planes if isinstance(p, fx.Node)
    ]
    if any(got is not None and got != want for got, want in zip(shapes, wanted, strict=False)):
        return f"planes of shapes {shapes} are not {spelling} of rows {list(rows)}, K={k}: {wanted}"
    return None
