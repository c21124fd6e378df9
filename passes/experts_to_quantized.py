"""experts(x, ids, weights) => experts with planes

Before    y: bf16[T, H] = MixtralExperts experts(x: bf16[T, H], ids: i64[T, k], weights: bf16[T, k])
After     y: bf16[T, H] = QExperts experts(x, ids, weights)

Experts stay one opaque call in the captured graph. `torch.compile` looks into it, and finds `fxquant::experts` ops.

Fires when       the plan gives a matrix of a stack of experts a scheme.
Stays out when   the plan keeps all of them: its reason is the miss. Experts that are traced instead of called are not
                 seen here; `quantize` replaces them all the same.
Numerics         lossy in the weights, by the errors that the report states; products are those of the dequantized
                 weights, sums over the experts of a token are in the dtype that the class has for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.expert_layouts import ExpertsLayout
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, layout_of
from fxquant.histories import Fired
from fxquant.rewrite import Editor, Pass


@dataclass(frozen=True)
class ExpertsToQuantized(Pass):
    """Put a `QExperts` in the place of every stack of experts of which the plan quantizes something."""

    def run(self, edit: Editor) -> None:
        """Replace the experts modules that the graph calls, each once."""
        calls = {str(node.target): node for node in edit.nodes() if node.op == "call_module"}
        for name, node in calls.items():
            module = edit.module(name)
            layout = layout_of(module)
            if isinstance(layout, str):
                edit.miss(layout, node.name)
            elif isinstance(layout, ExpertsLayout):
                self._replace(edit, ExpertSite(name, (name,), module, layout), node.name)

    def _replace(self, edit: Editor, site: ExpertSite, node: str) -> None:
        entries = {(e, p.name): edit.plan.get(name) if edit.plan else None for name, e, p in site.linears()}
        schemes = {key: entry.scheme for key, entry in entries.items() if entry is not None and entry.scheme}
        if schemes:
            edit.set_module(site.name, QExperts(site.module, site.layout, schemes))
            names = ", ".join(sorted({str(scheme) for scheme in schemes.values()}))
            edit.fired.append(Fired((node,), (node,), f"{site.name}: {len(schemes)} of {len(entries)} in {names}"))
            return
        reasons = {entry.reason or "no rule matches" for entry in entries.values() if entry is not None}
        edit.miss(f"kept: {'; '.join(sorted(reasons))}" if reasons else "the plan does not know this module", node)
