"""linear(x, A); linear(x, B) => c, s = quantize_activation(x); linear_on_codes(c, s, A); linear_on_codes(c, s, B)

Before    q = fxquant.linear(x, [q_codes, q_scales], [], 'int8+int8', [512], abi)
          v = fxquant.linear(x, [v_codes, v_scales], [], 'int4+int8', [128], abi)
After     codes, scales = fxquant.quantize_activation(x, 'int8', None, abi)
          q = fxquant.linear_on_codes(x, codes, scales, [q_codes, q_scales], [], 'int8+int8', [512], abi)
          v = fxquant.linear_on_codes(x, codes, scales, [v_codes, v_scales], [], 'int4+int8', [128], abi)

Fires when       two or more quantized linears that are not one call read the same node and quantize it alike; with
                 static scales: at the same stored scale.
Stays out when   their static scales are tensors of their own (two that hold the same number are not known to), or a
                 write, an autocast border or the like stands between them.
Numerics         exact: `linear` is these two steps.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.borders import epochs
from fxquant.listing import op_name, value
from fxquant.ops import ABI
from fxquant.rewrite import Editor, Pass
from fxquant.scheme import Activation, Scheme

_LINEAR = "fxquant.linear"


@dataclass(frozen=True)
class ShareActivationQuant(Pass):
    """Quantize an input once for all linears that read it, where their schemes keep them from being one call."""

    def run(self, edit: Editor) -> None:
        """Group the calls by input, activation and input scale, and let each group of two or more share."""
        calls = [(node, epoch, Scheme.parse(str(node.args[3]))) for node, epoch in _calls(edit)]
        groups: dict[Any, list[fx.Node]] = {}
        for node, epoch, scheme in calls:
            if scheme.activation is not None:
                key = (node.args[0], scheme.activation, _input_scale(node, scheme), epoch)
                groups.setdefault(key, []).append(node)
        readers = Counter((x, activation) for (x, activation, _, _), group in groups.items() for _ in group)
        scales = Counter((x, activation, scale) for (x, activation, scale, _), group in groups.items() for _ in group)
        for (x, activation, scale, _), group in groups.items():
            if len(group) > 1 and len(scale) < 2:
                _share(edit, group, activation)
            elif readers[x, activation] > 1:
                own = activation.static and (len(scale) > 1 or scales[x, activation, scale] == 1)
                reason = "its input scale is its own" if own else "a write or an autocast border stands between"
                for node in group:
                    edit.miss(reason, node.name)


def _calls(edit: Editor) -> list[tuple[fx.Node, int]]:
    return [(node, epoch) for node, epoch in epochs(edit.nodes()) if op_name(node) == _LINEAR]


def _input_scale(node: fx.Node, scheme: Scheme) -> tuple[Any, ...]:
    """The different input scales among the planes of a call: stored tensors by name, others by node."""
    found = dict.fromkeys(p.target if p.op == "get_attr" else p for p in _input_scale_nodes(node, scheme))
    return tuple(found)


def _input_scale_nodes(node: fx.Node, scheme: Scheme) -> list[fx.Node]:
    _, planes, _, _, rows, _ = node.args
    assert isinstance(planes, (list, tuple))
    assert isinstance(rows, (list, tuple))
    names = list(scheme.planes(1, 1))  # names depend on no size
    if "input_scale" not in names:
        return []
    per_weight = len(planes) // len(rows)
    found: list[fx.Node] = list(planes)[names.index("input_scale") :: per_weight]
    return found


def _share(edit: Editor, group: list[fx.Node], activation: Activation) -> None:
    first = group[0]
    scale = next(iter(_input_scale_nodes(first, Scheme.parse(str(first.args[3])))), None)
    with edit.before(first):
        op = torch.ops.fxquant.quantize_activation.default
        both = edit.call(op, first.args[0], str(activation), scale, ABI)
        codes, scales = (edit.call(operator.getitem, both, i) for i in range(2))
    shared = {}
    for node in group:
        x, *rest = node.args
        with edit.before(node):
            on_codes = torch.ops.fxquant.linear_on_codes.default
            # Autocast may give the result another dtype than its inputs tell.
            shared[node] = edit.call_with_value(value(node), on_codes, x, codes, scales, *rest)
    edit.replace_all(shared, note=f"{len(group)} linears")
