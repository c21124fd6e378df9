"""linear(x, A); linear(x, B) => split(linear(x, [A, B]))

Before    q = fxquant.linear(x, [q_codes, q_scales], [], 'int4', [512], abi)
          k = fxquant.linear(x, [k_codes, k_scales], [], 'int4', [128], abi)
After     y = fxquant.linear(x, [q_codes, q_scales, k_codes, k_scales], [], 'int4', [512, 128], abi)
          q, k = split(y, [512, 128], -1)

Fires when       two or more quantized linears of one scheme read the same node.
Stays out when   the planes are computed in the graph, or a write, an autocast border or the like stands between them;
                 on a GPU, where Inductor joins siblings by itself, and together with what reads them.
Numerics         exact: the same products and sums in the same order; static input scales stay those of each weight.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.borders import epochs
from fxquant.listing import op_name, value
from fxquant.ops import ABI
from fxquant.rewrite import Editor, Pass

_SAME_MEMORY = frozenset({"view", "reshape", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze"})
"""Ops that may pass on the strides of their input."""


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Make one call of the linears that read one tensor: q/k/v, gate/up. No list of architectures is needed."""

    def run(self, edit: Editor) -> None:
        """Group the calls by input and scheme, and merge each group of two or more."""
        groups: dict[Any, list[fx.Node]] = {}
        for node, epoch in epochs(edit.nodes()):
            if op_name(node) == "fxquant.linear":
                x, _, _, scheme, _, _ = node.args
                groups.setdefault((x, scheme, epoch), []).append(node)
        readers: dict[Any, int] = {}
        for (x, scheme, _), group in groups.items():
            readers[x, scheme] = readers.get((x, scheme), 0) + len(group)
        for (x, scheme, _), group in groups.items():
            if len(group) > 1 and _device(x) == "cuda":
                edit.miss("on a GPU its siblings and it are joined when the graph is compiled", group[0].name)
                continue
            mergeable = [n for n in group if _planes_are_stored(n)]
            for node in group:
                if node not in mergeable:
                    edit.miss("its planes are computed in the graph", node.name)
            if len(mergeable) > 1:
                _merge(edit, mergeable)
            elif len(group) == 1 and readers[x, scheme] > 1:
                edit.miss("a write or an autocast border stands between it and its siblings", group[0].name)


def _device(node: fx.Node) -> str | None:
    found = value(node)
    return found.device.type if isinstance(found, torch.Tensor) else None


def _planes_are_stored(node: fx.Node) -> bool:
    return all(isinstance(p, fx.Node) and p.op in ("placeholder", "get_attr") for p in _tensors(node))


def _tensors(node: fx.Node) -> list[Any]:
    _, planes, biases, *_ = node.args
    return [*_list(planes), *_list(biases)]


def _merge(edit: Editor, group: list[fx.Node]) -> None:
    first = group[0]
    x, scheme = first.args[0], first.args[3]
    rows = [n for node in group for n in _list(node.args[4])]
    for node in group[1:]:
        for tensor in _tensors(node):
            if tensor.op == "get_attr":
                first.prepend(tensor)  # a stored tensor can be read anywhere; the one call stands where the first stood
    with edit.before(first):
        planes = [p for node in group for p in _list(node.args[1])]
        args = (x, planes, _biases(edit, group, x), scheme, rows, ABI)
        merged = edit.call_with_value(_side_by_side(group), torch.ops.fxquant.linear.default, *args)
        pieces = edit.call(torch.ops.aten.split_with_sizes.default, merged, [sum(_list(n.args[4])) for n in group], -1)
        parts = {node: edit.call(operator.getitem, pieces, i) for i, node in enumerate(group)}
    edit.replace_all(parts, note=f"{len(group)} siblings")
    for part in parts.values():
        _relax_views(part)


def _side_by_side(group: list[fx.Node]) -> torch.Tensor | None:
    """The fake value of the merged call: the siblings' values joined, whatever dtype autocast gave them."""
    values = [value(node) for node in group]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None
    joined: torch.Tensor = values[0].new_empty(*values[0].shape[:-1], sum(v.shape[-1] for v in values))
    return joined


def _biases(edit: Editor, group: list[fx.Node], x: Any) -> list[Any]:
    per_weight = [bias for node in group for bias in (_list(node.args[2]) or [None] * len(_list(node.args[4])))]
    if all(bias is None for bias in per_weight):
        return []
    empty = edit.call(torch.ops.aten.new_empty.default, x, [0]) if None in per_weight else None
    return [empty if bias is None else bias for bias in per_weight]


def _list(argument: Any) -> list[Any]:
    return list(argument)


def _relax_views(part: fx.Node) -> None:
    """Let views of a piece be reshapes: a piece is not contiguous, so a view that was legal may not be one now."""
    todo, seen = [part], set()
    while todo:
        for user in todo.pop().users:
            name = op_name(user)
            if user in seen or name not in _SAME_MEMORY:
                continue
            seen.add(user)
            todo.append(user)
            if name == "view" and not isinstance(user.args[1], torch.dtype):
                user.target = "reshape" if user.op == "call_method" else torch.ops.aten.reshape.default
