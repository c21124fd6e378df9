"""Carrying out a plan on the user's model: weights become planes, layer by layer, and modules change places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from fxquant.codecs import all_finite, check_values, quantize, squared_error
from fxquant.errors import ModelError, SchemeError
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, expert_weight, find_experts
from fxquant.modules import QLinear, follow_device_hook
from fxquant.plans import Plan, PlanEntry
from fxquant.rewrite import History

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


def forget(model: nn.Module) -> None:
    """Take what `quantize` left off the model."""
    model.__dict__.pop(_RECORD, None)


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse weights whose values cannot be stored, before anything has changed.

    Raises:
        ModelError: some hold inf or nan; names the layers.
        SchemeError: some are too large for a library's rule; names the first layer.
    """
    stacked = {name: weight for site in find_experts(model) for name, weight in site.weights()}
    broken = [
        e.name
        for e in plan.quantized
        if not all_finite(stacked[e.name] if e.kind == "expert" else model.get_submodule(e.name).get_parameter("weight"))
    ]
    if broken:
        raise ModelError(
            f"{len(broken)} of {len(plan.quantized)} weights hold inf or nan, which no scheme can store\n"
            f"  {', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}\n"
            "  the model was not changed: mend these weights, or keep these layers with exclude=[...]"
        )
    for entry in plan.quantized:
        assert entry.scheme is not None
        try:
            check_values(model.get_submodule(entry.name).get_parameter("weight"), entry.scheme, entry.scale)
        except SchemeError as error:
            raise SchemeError(f"{entry.name}: {error}\n  the model was not changed") from None


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
        modules: modules that passes made, by FQN: `QLinear`s of the plan, still without planes, and any others.
        done: called after each layer.
        input_scales: of the layers with static activation scales, by name.
    """
    record = Record(plan, history)
    model.__dict__[_RECORD] = record
    for fqn, module in modules.items():
        if not isinstance(module, QLinear):
            _place(model, (fqn,), module)
    for entry in plan.quantized:
        if entry.kind == "expert":
            continue
        made = modules.get(entry.name)
        new = made if isinstance(made, QLinear) else None
        record.errors[entry.name] = _install_one(model, entry, new, input_scales.get(entry.name))
        done(entry)
    for site in find_experts(model):
        _install_experts(model, site, plan, record, done)


def _install_one(model: nn.Module, entry: PlanEntry, new: QLinear | None, input_scale: float | None) -> float:
    assert entry.scheme is not None
    old = model.get_submodule(entry.name)
    if new is None:  # the graph never calls it, or there is no graph
        new = QLinear.replacing(old, entry.scheme, transposed=entry.transposed)
    weight = old.get_parameter("weight").detach()
    weight = weight.t() if entry.transposed else weight
    with torch.no_grad():
        planes = quantize(weight, entry.scheme, entry.scale)
        if input_scale is not None:
            planes["input_scale"].fill_(input_scale)
        error = float("nan") if weight.is_meta else squared_error(weight, planes, entry.scheme)
    new.load_planes(planes)
    follow_device_hook(new, old)
    _place(model, entry.aliases or (entry.name,), new)
    return error


def _install_experts(
    model: nn.Module, site: ExpertSite, plan: Plan, record: Record, done: Callable[[PlanEntry], None]
) -> None:
    """Quantize the experts of one module and put the new module in place: all of them in one step."""
    found = {(e, p.name): plan.get(name) for name, e, p in site.linears()}
    planned = {key: entry for key, entry in found.items() if entry is not None and entry.scheme is not None}
    if not planned:
        return
    new = QExperts(site.module, site.layout, {key: entry.scheme for key, entry in planned.items()})
    for (e, projection), entry in planned.items():
        weight = expert_weight(site.module, site.layout, projection, e).detach()
        assert entry.scheme is not None
        with torch.no_grad():
            planes = quantize(weight, entry.scheme, entry.scale)
            missing = weight.is_meta
            record.errors[entry.name] = float("nan") if missing else squared_error(weight, planes, entry.scheme)
        new.load_planes(projection, e, planes)
        done(entry)
    follow_device_hook(new, site.module)
    _place(model, site.aliases, new)


def uninstall(model: nn.Module) -> int:
    """Put back the modules that `QLinear`s replaced, with dequantized weights; returns how many there were."""
    names: dict[QLinear | QExperts, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (QLinear, QExperts)):
            names.setdefault(module, []).append(name)
    count = len(names)
    while names:
        module, found = names.popitem()
        new = module.restore()
        follow_device_hook(new, module)
        _place(model, tuple(found), new)
    forget(model)
    return count


def _place(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
