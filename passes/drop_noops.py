"""x.to(dtype of x) => x;  dropout(x, training=False) => x;  view(x, shape of x) => x

Before    h: bf16[2, 8, 256] = to(x: bf16[2, 8, 256], bf16);  q = q_proj(h)
After     q = q_proj(x)

Fires when       an op gives its first argument back unchanged: same shape, dtype and device, and no random numbers.
Stays out when   the result's shape, dtype or device is not known, or differs.
Numerics         exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxquant.listing import op_name, value
from fxquant.rewrite import Editor, Pass


def _always(node: fx.Node) -> bool:
    return True


def _inactive(node: fx.Node) -> bool:
    """Whether this dropout is not training: it then gives back its input itself (with p = 0 it would copy)."""
    rest = dict(zip(("p", "training"), node.args[1:3], strict=False)) | dict(node.kwargs)
    return rest.get("training", rest.get("train", True)) is False


def _plain_copy(node: fx.Node) -> bool:
    """Whether this `to` asks for nothing but a dtype or device (a copy or a memory format must stay)."""
    copies = node.kwargs.get("copy", False) or any(a is True for a in node.args[1:])
    return not copies and node.kwargs.get("memory_format") is None


_NOOPS: Mapping[str, Callable[[fx.Node], bool]] = MappingProxyType(
    {
        "to": _plain_copy,
        "alias": _always,
        "view": _always,
        "reshape": _always,
        "expand": _always,
        "dropout": _inactive,
        "feature_dropout": _inactive,
    }
)
"""Ops that give their first argument back when shape, dtype and device stay the same and the predicate holds."""


@dataclass(frozen=True)
class DropNoops(Pass):
    """Remove ops that change nothing, so that readers of one tensor read one node."""

    def run(self, edit: Editor) -> None:
        """Replace each such node by its input; drop assertions on metadata, which capture has checked."""
        for node in edit.nodes():
            name = op_name(node)
            if name == "_assert_tensor_metadata":
                edit.remove(node, note="assertion")
            elif name in _NOOPS and node.args and isinstance(node.args[0], fx.Node):
                source = node.args[0]
                if _same(value(node), value(source)) and _NOOPS[name](node):
                    edit.replace(node, source, note=name)


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    # As text, so that symbols are compared by name: comparing their values would add guards.
    sizes = zip(map(str, (*a.shape, *a.stride())), map(str, (*b.shape, *b.stride())), strict=False)
    return a.ndim == b.ndim and a.dtype == b.dtype and a.device == b.device and all(p == q for p, q in sizes)
