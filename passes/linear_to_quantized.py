"""linear(x) => fxquant.linear(x, planes)

Before    y: bf16[M, N] = Linear q_proj(x: bf16[M, K])
After     codes = self.q_proj.codes;  scales = self.q_proj.scales
          y: bf16[M, N] = fxquant.linear(x, [codes, scales], [], 'int4', [N], abi)

Fires when       the plan gives the module a scheme, or the module is quantized already.
Stays out when   the plan keeps the module in full precision; the plan's reason is the miss.
Numerics         lossy in the weight, by the error that the report states per layer; exact in x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from fxquant.modules import QLinear
from fxquant.ops import ABI
from fxquant.patterns import Match, Module
from fxquant.rewrite import Editor, Miss, Pass


@dataclass(frozen=True)
class LinearToQuantized(Pass):
    """Put a `QLinear` in the place of every linear that the plan quantizes, and its op into the graph."""

    def pattern(self) -> Module:
        """A call of a module with one input; in a captured graph that is a linear."""
        return Module(nn.Module, "x")

    def check(self, edit: Editor, match: Match) -> Miss | None:
        """Stay out of what the plan keeps."""
        fqn = str(match.root.target)
        if isinstance(edit.module(fqn), QLinear):
            return None
        entry = edit.plan.get(fqn) if edit.plan else None
        if entry is None:
            return Miss("the plan does not know this module")
        return None if entry.scheme else Miss(f"kept: {entry.reason or 'no rule matches'}")

    def rewrite(self, edit: Editor, match: Match) -> fx.Node:
        """The op on the planes of the module."""
        fqn = str(match.root.target)
        module = edit.module(fqn)
        if not isinstance(module, QLinear):
            assert edit.plan is not None
            entry = edit.plan[fqn]
            assert entry.scheme is not None
            module = QLinear.replacing(module, entry.scheme, transposed=entry.transposed)
            edit.set_module(fqn, module)
        planes = [edit.attr(f"{fqn}.{name}") for name in module.plane_names]
        biases = [] if module.bias is None else [edit.attr(f"{fqn}.bias")]
        op = torch.ops.fxquant.linear.default
        return edit.call(op, match["x"], planes, biases, module.spelling, [module.out_features], ABI)
