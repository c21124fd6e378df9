"""The experts of a mixture: which modules hold them, and where in them each expert's matrices lie.

In transformers most experts are stacked in three-dimensional parameters. To rules, plans and files each matrix of each
expert is a linear of its own all the same: `<module>.<expert>.<projection>`, the names of checkpoints on the hub, such
as `model.layers.3.mlp.experts.17.down_proj`.

One rule covers every class that follows transformers' convention, see `ExpertsAdapter`; classes that do not have an
entry in a registry, and a class of your own gets one with `register_experts`:

    class MyExperts(nn.Module):  # wi and wo [E, in, out], two projections without a gate
        def forward(self, x, expert, weight): ...

    def forward(experts, x, expert, weight):  # the same names; x [T, H], expert and weight [T]
        ids = expert.unsqueeze(-1)
        y = experts.project("down_proj", torch.relu(experts.project("up_proj", x, ids)), ids)
        return y.squeeze(1) * weight.unsqueeze(-1)

    register_experts("MyExperts", ExpertsAdapter(
        (Projection("up_proj", "wi", transposed=True), Projection("down_proj", "wo", transposed=True)), forward
    ))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant import expert_forwards
from fxquant.expert_layouts import (
    ExpertsLayout,
    Forward,
    Projection,
    expert_bias,
    expert_name,
    expert_weight,
    stacked_weight,
)

__all__ = [
    "ExpertSite",
    "ExpertsAdapter",
    "ExpertsLayout",
    "Projection",
    "expert_bias",
    "expert_name",
    "expert_weight",
    "find_experts",
    "find_unread_experts",
    "layout_of",
    "register_experts",
    "stacked_weight",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ExpertsAdapter:
    """How the experts of a class are to be read."""

    projections: tuple[Projection, ...] = ()
    """Nothing: by transformers' convention. Parameters `gate_up_proj` (or `up_proj`, without a gate) and `down_proj`,
    three-dimensional, with biases of the same name and `_bias`, as the flags `is_transposed`, `has_bias`, `has_gate`
    and `is_concatenated` say that `use_experts_implementation` leaves on a module, or else as the shapes do."""
    forward: Forward = expert_forwards.by_convention
    """Takes arguments of the same names as the forward of the class, if it is not the convention's."""
    experts: str | None = None
    """Attribute that tells how many experts there are; by default the smallest first dimension of a parameter."""


@dataclass(frozen=True, eq=False)
class ExpertSite:
    """One experts module of a model, under all its names."""

    name: str
    """The first name in `named_modules` order; empty where the model itself holds the experts."""
    aliases: tuple[str, ...]
    """Every name of this very module object, `name` first."""
    module: nn.Module
    layout: ExpertsLayout

    def linears(self) -> Iterator[tuple[str, int, Projection]]:
        """Every matrix: its name, its expert and its projection; expert by expert."""
        for e in range(self.layout.experts):
            for projection in self.layout.projections:
                yield expert_name(self.name, e, projection.name), e, projection

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix `[N, K]`, a view, by its name."""
        for name, e, projection in self.linears():
            yield name, expert_weight(self.module, self.layout, projection.name, e)


_ADAPTERS: dict[str, ExpertsAdapter] = {
    "DbrxExperts": ExpertsAdapter(
        (
            Projection("gate_proj", "mlp.w1"),
            Projection("up_proj", "mlp.v1"),
            Projection("down_proj", "mlp.w2", transposed=True),
        ),
        expert_forwards.separately_gated,
        experts="num_experts",
    ),
    "InklingSharedExperts": ExpertsAdapter(
        tuple(Projection(name, name) for name in ("gate_proj", "up_proj", "down_proj")), expert_forwards.all_of_them
    ),
    "JetMoeParallelExperts": ExpertsAdapter((Projection("proj", "weight"),), expert_forwards.in_order),
    "Llama4TextExperts": ExpertsAdapter(forward=expert_forwards.on_own_tokens),
    # Its gate and up have rows for the experts that do nothing too; these are never read.
    "LongcatFlashExperts": ExpertsAdapter(forward=expert_forwards.with_identities, experts="num_routed_experts"),
    "OpenAIPrivacyFilterExperts": ExpertsAdapter(forward=expert_forwards.in_float32),
}
"""Class name: adapter. The one thing in fxquant that is set for a whole process, by `register_experts`: what a class
computes is the same wherever it is used, and `from_pretrained` builds modules where no argument could reach."""


def register_experts(class_name: str, adapter: ExpertsAdapter) -> None:
    """Tell how the experts of a class, or of its subclasses, are to be read; takes the place of an earlier entry.

    Args:
        class_name: `__name__` of the module class. An adapter applies to modules that have its parameters and whose
            forward has arguments of the names that the adapter's has; to no others.
        adapter: where the matrices lie and what is computed with them, see the example above.
    """
    _ADAPTERS[class_name] = adapter


def find_experts(model: nn.Module) -> list[ExpertSite]:
    """Every module of `model` that holds stacked experts which can be read, in `named_modules` order.

    Each module object comes once, with all its names. Runs no forward, on any device, meta included.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found = ((module, layout_of(module)) for module in names)
    return [
        ExpertSite(names[module][0], tuple(names[module]), module, layout)
        for module, layout in found
        if isinstance(layout, ExpertsLayout)
    ]


def find_unread_experts(model: nn.Module) -> dict[str, str]:
    """Modules that look like stacked experts and cannot be read: name and reason, as the end of a sentence."""
    found = ((name, layout_of(module)) for name, module in model.named_modules())
    return {name: layout for name, layout in found if isinstance(layout, str)}


def layout_of(module: nn.Module) -> ExpertsLayout | str | None:
    """The layout of an experts module; why it cannot be read, as the end of a sentence; None for all other modules."""
    adapter = next((_ADAPTERS[c.__name__] for c in type(module).__mro__ if c.__name__ in _ADAPTERS), None)
    if adapter is None and not _is_conventional(module):
        return None
    if all(parameter is None for parameter in module.parameters()):
        return None  # LongCat has layers in which every expert is an identity
    adapter = adapter or ExpertsAdapter()
    projections = adapter.projections or _conventional(module)
    if isinstance(projections, str):
        return projections
    problem = _forward_problem(module, adapter) or _parameter_problem(module, projections)
    if problem:
        return problem
    sizes = [module.get_parameter(p.parameter).shape[0] for p in projections]
    experts = getattr(module, adapter.experts, None) if adapter.experts else min(sizes)
    if not isinstance(experts, int) or experts < 1:
        return f"the number of its experts is {experts!r}"
    layout = ExpertsLayout(experts, projections, adapter.forward)
    return _shape_problem(module, layout) or layout


def _stack(module: nn.Module, name: str) -> Tensor | None:
    tensor = module._parameters.get(name)
    return tensor if tensor is not None and tensor.dim() == 3 else None


def _is_conventional(module: nn.Module) -> bool:
    first = _stack(module, "gate_up_proj"), _stack(module, "up_proj")
    return _stack(module, "down_proj") is not None and first != (None, None)


def _conventional(module: nn.Module) -> tuple[Projection, ...] | str:
    """The projections by transformers' convention, or why there are none."""
    gated = _stack(module, "gate_up_proj") is not None
    first = "gate_up_proj" if gated else "up_proj"
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = _looks_transposed(module) if gated else None
    if transposed is None:
        return _unknown(module, "shapes do not tell whether its matrices are transposed")
    bias = {name: f"{name}_bias" for name in (first, "down_proj") if f"{name}_bias" in module._parameters}
    if getattr(module, "has_bias", bool(bias)) != bool(bias) or len(bias) == 1:
        return _unknown(module, f"its biases are {list(bias.values()) or 'missing'}")
    down = Projection("down_proj", "down_proj", transposed, bias=bias.get("down_proj"))
    if not gated:
        return (Projection("up_proj", first, transposed, bias=bias.get(first)), down)
    interleaved = not getattr(module, "is_concatenated", True)
    halves = (
        Projection(name, first, transposed, part, 2, interleaved, bias.get(first))
        for part, name in enumerate(("gate_proj", "up_proj"))
    )
    return (*halves, down)


def _looks_transposed(module: nn.Module) -> bool | None:
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    (a, b), (c, d) = gate_up.shape[1:], down.shape[1:]
    if (a, b) == (2 * d, c):
        return False
    return True if (a, b) == (d, 2 * c) else None


def _unknown(module: nn.Module, what: str) -> str:
    name = type(module).__name__
    return f"how its class {name} computes is not known: {what}; tell with register_experts({name!r}, ...)"


def _forward_problem(module: nn.Module, adapter: ExpertsAdapter) -> str | None:
    own = _arguments(type(module).forward)
    if adapter.forward is not expert_forwards.by_convention:
        taken = _arguments(adapter.forward)
        return None if own == taken else _unknown(module, f"its forward takes {own}, its adapter {taken}")
    if len(own) != 3:
        return _unknown(module, f"its forward takes {own}, not hidden states, expert ids and weights")
    if not callable(getattr(module, "act_fn", None)) and not hasattr(module, "_apply_gate"):
        return _unknown(module, "it has neither act_fn nor _apply_gate")
    return None


def _arguments(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _parameter_problem(module: nn.Module, projections: tuple[Projection, ...]) -> str | None:
    for name in dict.fromkeys(name for p in projections for name in (p.parameter, p.bias) if name):
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            return f"it has no child {path}"
        tensor = owner._parameters.get(leaf)
        if tensor is None:
            return f"it has no parameter {name}"
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.dtype not in _FLOATS:
            return f"its {name} is no plain tensor of floats: {type(tensor).__name__}, {tensor.dtype}"
    return None


def _shape_problem(module: nn.Module, layout: ExpertsLayout) -> str | None:
    for p in layout.projections:
        shape = tuple(module.get_parameter(p.parameter).shape)
        fits = shape[0] >= layout.experts if len(shape) == 3 else len(shape) == 2 and shape[0] % layout.experts == 0
        if not fits:
            return f"its {p.parameter} {list(shape)} does not hold {layout.experts} experts"
        n = stacked_weight(module, layout, p.parameter).shape[1]
        bias = tuple(module.get_parameter(p.bias).shape) if p.bias else (layout.experts, n)
        if n % p.parts or bias != (layout.experts, n):
            return f"its {p.parameter} {list(shape)} and bias {list(bias)} do not consist of {p.parts} parts"
    return None
