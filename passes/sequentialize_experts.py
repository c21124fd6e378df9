"""experts (stacked parameters) => experts (a linear per matrix)

Before    y: bf16[T, H] = MixtralExperts experts(x: bf16[T, H], ids: i64[T, k], weights: bf16[T, k])
After     y: bf16[T, H] = SequentialExperts experts(x, ids, weights)
          with the linears experts.0.gate_proj, experts.0.up_proj, experts.0.down_proj, experts.1.gate_proj, ...

Fires when       a module that holds stacked experts has a name that `names` reaches and, unless `methods` is all, the
                 plan gives one of its matrices a scheme that `methods` reaches.
Stays out when   its class is not known, its parameters are shared, or its forward, offloading or gradients stand in
                 the way: the reason is the miss. Experts that are traced instead of called are not seen.
Numerics         exact in the weights; sums of products in another order, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxquant.errors import ModelError, RecipeError
from fxquant.expert_containers import held_parameters
from fxquant.expert_layouts import ExpertsLayout
from fxquant.experts import layout_of
from fxquant.histories import Fired
from fxquant.name_match import compile_name_pattern
from fxquant.rewrite import Editor, Pass
from fxquant.sequential_experts import SequentialExperts

_ALL = ("*",)


@dataclass(frozen=True)
class SequentializeExperts(Pass):
    """Put `SequentialExperts` in the place of stacked experts. Not among the defaults: ask for it where it is needed.

    quantize(model, recipe, passes=(SequentializeExperts(), *DEFAULT))
    """

    names: tuple[str, ...] = _ALL
    """Patterns of experts modules (`model.layers.{0..3}.mlp.experts`), as rules have them."""
    methods: tuple[str, ...] = _ALL
    """Patterns of schemes that ask for it (`llm-int8`, `*+int8*`), by their spellings in the plan."""

    def __post_init__(self) -> None:
        """Refuse a string where several are meant: its letters would be the patterns."""
        for name in ("names", "methods"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise RecipeError(f"{name} are patterns in a tuple, got {value!r}\n  write {name}=({value!r},)")

    def run(self, edit: Editor) -> None:
        """Replace the experts modules that the graph calls, each once."""
        calls = [node for node in edit.nodes() if node.op == "call_module"]
        experts = {str(n.target): n for n in calls if layout_of(edit.module(str(n.target))) is not None}
        self._check_names(list(experts))
        owners = _owners(edit.gm)
        for name, node in experts.items():
            if any(compile_name_pattern(pattern).matches(name) for pattern in self.names):
                reason = self._replace(edit, name, owners)
                if reason is None:
                    edit.fired.append(Fired((node.name,), (node.name,), f"{name}: a linear per matrix"))
                else:
                    edit.miss(reason, node.name)

    def _check_names(self, experts: list[str]) -> None:
        for pattern in self.names:
            compiled = compile_name_pattern(pattern)
            if pattern not in _ALL and not any(compiled.matches(name) for name in experts):
                there = ", ".join(experts[:5]) + (", ..." if len(experts) > 5 else "")
                raise RecipeError(f'"{pattern}" matches no experts\n  experts in the graph: {there or "none"}')

    def _replace(self, edit: Editor, name: str, owners: dict[int, list[str]]) -> str | None:
        """Put the module in; or why it was left alone."""
        module = edit.module(name)
        layout = layout_of(module)
        if not isinstance(layout, ExpertsLayout):
            return layout
        if not self._asked_for(edit, name):
            return f"the plan gives it no scheme of {', '.join(self.methods)}"
        for parameter in held_parameters(layout):
            found = owners[id(module.get_parameter(parameter))]
            if len(found) > 1:
                return f"{' and '.join(found[:3])} are one parameter, which would be several"
        try:
            edit.set_module(name, SequentialExperts(module, layout))
        except ModelError as error:
            return str(error)
        return None

    def _asked_for(self, edit: Editor, name: str) -> bool:
        if self.methods == _ALL:
            return True
        entries = edit.plan.quantized if edit.plan else ()
        schemes = {str(entry.scheme) for entry in entries if entry.name.startswith(f"{name}.")}
        return any(compile_name_pattern(method).matches(scheme) for method in self.methods for scheme in schemes)


def _owners(gm: fx.GraphModule) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
