"""Carrying out a plan on the user's model: weights become planes, layer by layer, and modules change places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fxquant.codecs import all_finite, check_values, quantize, squared_error
from fxquant.errors import ModelError, SchemeError
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, ExpertsLayout, expert_weight, find_experts, layout_of
from fxquant.modules import QLinear, follow_device_hook
from fxquant.plans import Plan, PlanEntry
from fxquant.rewrite import History
from fxquant.sequential_experts import SequentialExperts

_RECORD = "_fxquant"


@dataclass
class Record:
    """What `quantize` leaves on the model: plain data, no tensors."""

    plan: Plan
    history: History
    errors: dict[str, float] = field(default_factory=dict)
    """Relative squared error of each quantized weight, by name; nan for weights on the meta device."""


def record_of(model: nn.Module) -> Record | None:
    """What `quantize` left on the model, or None."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    found = model.__dict__.get(_RECORD)
    return found if isinstance(found, Record) else None


def remember(model: nn.Module, record: Record) -> None:
    """Leave on the model what was done to it."""
    model.__dict__[_RECORD] = record


def forget(model: nn.Module) -> None:
    """Take what `quantize` left off the model."""
    model.__dict__.pop(_RECORD, None)


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse weights whose values cannot be stored, before anything has changed.

    Raises:
        ModelError: some hold inf or nan; names the layers.
        SchemeError: some are too large for a library's rule; names the first layer.
    """
    weights = {e.name: weight for e, weight in _planned_weights(model, plan)}
    broken = [name for name, weight in weights.items() if not all_finite(weight)]
    if broken:
        raise ModelError(
            f"{len(broken)} of {len(weights)} weights hold inf or nan, which no scheme can store\n"
            f"  {', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}\n"
            "  the model was not changed: mend these weights, or keep these layers with exclude=[...]"
        )
    for entry in plan.quantized:
        assert entry.scheme is not None
        try:
            check_values(weights[entry.name], entry.scheme, entry.scale)
        except SchemeError as error:
            raise SchemeError(f"{entry.name}: {error}\n  the model was not changed") from None


def _planned_weights(model: nn.Module, plan: Plan) -> Iterator[tuple[PlanEntry, Tensor]]:
    """Every weight that is to be quantized, `[N, K]`, a view."""
    stacked = {name: weight for site in find_experts(model) for name, weight in site.weights()}
    for entry in plan.quantized:
        yield entry, stacked[entry.name] if entry.kind == "expert" else linear_weight(model, entry)


def linear_weight(model: nn.Module, entry: PlanEntry) -> Tensor:
    """The weight of a linear, `[N, K]`, a view."""
    weight = model.get_submodule(entry.name).get_parameter("weight").detach()
    return weight.t() if entry.transposed and entry.kind == "linear" else weight


def install(
    model: nn.Module,
    plan: Plan,
    history: History,
    modules: Mapping[str, nn.Module],
    done: Callable[[PlanEntry], None],
    input_scales: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Quantize the planned weights one by one and put the modules in place.

    Each layer changes in one step, so an interruption leaves a model that works, part of it quantized. A layer's weight
    is let go as soon as its planes are made.

    Args:
        model: changed in place.
        plan: which linear gets which scheme.
        history: kept on the model.
        modules: modules that passes made, by FQN: those of the plan's weights, still without planes, and any others.
        done: called after each layer.
        input_scales: of the layers with static activation scales, by name.
    """
    record = Record(plan, history)
    remember(model, record)
    for fqn, module in modules.items():
        if not isinstance(module, (QLinear, QExperts)):
            place(model, (fqn,), module)
    # Names alone: a reference to a module of experts would keep its weights.
    stacks = {site.aliases: [name for name, _, _ in site.linears()] for site in find_experts(model)}
    inside = {name for names in stacks.values() for name in names}
    for entry in plan.quantized:
        if entry.name not in inside:
            made = modules.get(entry.name)
            new = made if isinstance(made, QLinear) else None
            record.errors[entry.name] = install_linear(model, entry, new, input_scales.get(entry.name))
            done(entry)
    for aliases, names in stacks.items():
        planned = {name: e for name in names if (e := plan.get(name)) is not None and e.scheme is not None}
        if planned:
            made = modules.get(aliases[0])
            for entry, error in _install_experts(model, aliases, planned, made if isinstance(made, QExperts) else None):
                record.errors[entry.name] = error
                done(entry)
    for module in modules.values():
        if isinstance(module, SequentialExperts):
            module.own_weights()


def install_linear(
    model: nn.Module, entry: PlanEntry, new: QLinear | None = None, input_scale: float | None = None
) -> float:
    """Quantize one linear and put the new module in place, under all its names; the relative squared error.

    Args:
        model: changed in place.
        entry: which linear, and its scheme.
        new: a module for it, still without planes.
        input_scale: of a static activation scheme.
    """
    assert entry.scheme is not None
    old = model.get_submodule(entry.name)
    transposed = entry.transposed and entry.kind == "linear"  # experts that a pass made linears of are not
    if new is None:  # the graph never calls it, or there is no graph
        new = QLinear.replacing(old, entry.scheme, transposed=transposed)
    planes, error = _encode(linear_weight(model, entry), entry, input_scale)
    new.load_planes(planes)
    follow_device_hook(new, old)
    place(model, entry.aliases or (entry.name,), new)
    return error


def _install_experts(
    model: nn.Module, aliases: tuple[str, ...], planned: Mapping[str, PlanEntry], new: QExperts | None
) -> Iterator[tuple[PlanEntry, float]]:
    """Quantize the experts of one module and put the new module in place, all of them in one step."""
    module = model.get_submodule(aliases[0])
    layout = layout_of(module)
    assert isinstance(layout, ExpertsLayout)
    site = ExpertSite(aliases[0], aliases, module, layout)
    new = new or empty_experts(site, planned)
    yield from fill_experts(site, planned, new)
    follow_device_hook(new, module)
    place(model, aliases, new)


def empty_experts(site: ExpertSite, planned: Mapping[str, PlanEntry]) -> QExperts:
    """The module that takes the place of experts, still without planes.

    Args:
        site: the experts.
        planned: those of their matrices that get a scheme, by name.
    """
    schemes = {(e, p.name): planned[name].scheme for name, e, p in site.linears() if name in planned}
    return QExperts(site.module, site.layout, schemes)


def fill_experts(
    site: ExpertSite, planned: Mapping[str, PlanEntry], new: QExperts, parameter: str | None = None
) -> Iterator[tuple[PlanEntry, float]]:
    """Quantize experts into the module that takes their place; each matrix with its relative squared error.

    Args:
        site: the experts, as they are.
        planned: those of their matrices that get a scheme, by name.
        new: what `empty_experts` made of them.
        parameter: only the matrices that this parameter holds; None: all.
    """
    for name, e, projection in site.linears():
        if parameter not in (None, projection.parameter):
            continue
        if name in planned:
            weight = expert_weight(site.module, site.layout, projection.name, e).detach()
            planes, error = _encode(weight, planned[name])
            new.load_planes(projection.name, e, planes)
            yield planned[name], error
        elif not new.keeps_parameter(projection.name):
            kept = expert_weight(site.module, site.layout, projection.name, e).detach()
            new.load_planes(projection.name, e, {"weight": kept})


def _encode(weight: Tensor, entry: PlanEntry, input_scale: float | None = None) -> tuple[dict[str, Tensor], float]:
    """The planes of a weight, and their relative squared error."""
    assert entry.scheme is not None
    with torch.no_grad():
        planes = quantize(weight, entry.scheme, entry.scale)
        if input_scale is not None:
            planes["input_scale"].fill_(input_scale)
        return planes, float("nan") if weight.is_meta else squared_error(weight, planes, entry.scheme)


def uninstall(model: nn.Module) -> int:
    """Put back the modules that were replaced, with dequantized weights; returns how many there were."""
    names: dict[QLinear | QExperts, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (QLinear, QExperts)):
            names.setdefault(module, []).append(name)
    count = len(names)
    while names:
        module, found = names.popitem()
        new = module.restore()
        follow_device_hook(new, module)
        place(model, tuple(found), new)
    forget(model)
    return count


def place(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    """Set a module under these names."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
