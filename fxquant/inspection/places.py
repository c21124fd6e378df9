"""Which tensors of the files are which of the model: what is missing, what is left over, what has another shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from fxquant.checkpoint_files import LazyTensor
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import FxquantError
from fxquant.experts import ExpertSite, find_experts
from fxquant.inspection.data import Notes
from fxquant.inspection.matrices import is_below
from fxquant.inspection.opening import Opened
from fxquant.linears import LinearSite, find_linears
from fxquant.plain_tensors import empty
from fxquant.scheme import PlaneSpec
from fxquant.transformers_weights import Names


@dataclass
class Places:
    """The tensors of a checkpoint, by what the model calls them."""

    linears: Mapping[str, LinearSite]
    """By every name of each."""
    experts: tuple[ExpertSite, ...]
    shapes: Mapping[str, tuple[int, int]]
    """N and K of every linear and of every matrix of experts."""
    matrices: dict[str, StoredWeight] = field(default_factory=dict)
    """Quantized ones."""
    singles: dict[str, str] = field(default_factory=dict)
    """Matrices of experts in full precision that are a tensor of their own, among quantized ones."""
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The tensors that make up each parameter in full precision."""
    misfits: set[str] = field(default_factory=set)
    """Parameters that have another shape in the files, or cannot be made of what is there."""
    damaged: frozenset[str] = frozenset()
    """Modules of the model that are quantized in the files, and cannot be read."""


def find_places(opened: Opened, model: nn.Module, notes: Notes) -> Places:
    """Put every tensor in its place; noted: those that have none, and places that stay empty."""
    names = Names(model)
    places = empty_places(model)
    for weight in opened.weights:
        _place_matrix(weight, names, places, notes)
    places.damaged = frozenset(names.of_matrix(module) or module for module in opened.damaged)
    quantized = {name for site in places.experts for name, _, _ in site.linears() if name in places.matrices}
    owners = {name: site for site in places.experts for name, _, _ in site.linears()}
    mixed = {owners[name].name for name in quantized}
    for name in opened.plain:
        own = names.of_matrix(name.removesuffix(".weight")) if mixed and name.endswith(".weight") else None
        if own in owners and owners[own].name in mixed:
            places.singles[own] = name
    single = set(places.singles.values())
    rest = {name: tensor for name, tensor in opened.plain.items() if name not in single}
    _place_plain(rest, names, places, notes)
    return places


def empty_places(model: nn.Module) -> Places:
    """The places of a model, with nothing in them."""
    sites, experts = find_linears(model), tuple(find_experts(model))
    shapes = {site.name: (site.n, site.k) for site in sites}
    for site in experts:
        shapes |= {name: (weight.shape[0], weight.shape[1]) for name, weight in site.weights()}
    return Places({alias: site for site in sites for alias in site.aliases}, experts, shapes)


def _place_matrix(weight: StoredWeight, names: Names, places: Places, notes: Notes) -> None:
    own = names.of_matrix(weight.name)
    if own is None:
        notes.problem(weight.name, "it is quantized, and the model has no linear of this name")
    elif own in places.matrices:
        notes.problem(weight.name, f"{places.matrices[own].name} and this are the same linear of the model")
    else:
        places.matrices[own] = weight
        obstacle = places.linears[own].obstacle if own in places.linears else None
        if obstacle is not None:
            notes.problem(weight.name, f"it is quantized, and cannot be put into the model: {obstacle}")


def _place_plain(plain: Mapping[str, LazyTensor], names: Names, places: Places, notes: Notes) -> None:
    state = names.model.state_dict(keep_vars=True)
    fitting: dict[str, LazyTensor] = {}
    together: dict[str, list[str]] = {}
    for name, tensor in plain.items():
        key, pattern = names.renamed(name)
        if pattern is not None and key in state:
            together.setdefault(key, []).append(name)
            continue
        key = name if key not in state and name in state else key
        places.sources[key] = (name,)
        if key in state and tuple(state[key].shape) != tuple(tensor.shape):
            notes.problem(name, f"it is {list(tensor.shape)} in the files, and {list(state[key].shape)} in the model")
            places.misfits.add(key)
        else:
            fitting[name] = tensor
    for key, sources in together.items():
        try:
            made = names.convert({name: empty(_spec(plain[name])) for name in sources})
        except FxquantError as error:
            notes.problem(key, error)
            places.misfits.add(key)
        else:
            places.sources |= dict.fromkeys(made, tuple(sources))
            fitting |= {name: plain[name] for name in sources}
    _note_rest(fitting, names, places, notes)


def _note_rest(plain: Mapping[str, LazyTensor], names: Names, places: Places, notes: Notes) -> None:
    """What stays empty, and what is left over, after transformers' own rules."""
    state = names.model.state_dict(keep_vars=True)
    held = places.misfits | _held(places) | {key for key in state if is_below(key, places.damaged)}
    told = {one.place for one in notes.found}
    made = {name: empty(_spec(tensor)) for name, tensor in plain.items()}
    with notes.noted():
        missing, unexpected = names.load(made, torch.device("meta"))
        for name in sorted(missing - held - told):
            notes.problem(name, "the model has it, and the files do not")
        for name in sorted(unexpected - told):
            notes.problem(name, "the files have it, and the model does not")
    for site in places.experts:
        own = [name for name, _, _ in site.linears()]
        lost = [name for name in own if name not in places.matrices and name not in places.singles]
        if len(lost) < len(own):
            for name in lost:
                if name not in told and not is_below(name, places.damaged):
                    notes.problem(name, "the model has it, and the files do not")


def _held(places: Places) -> set[str]:
    """Parameters that are quantized, wholly or in part."""
    held = {f"{alias}.weight" for alias, site in places.linears.items() if site.name in places.matrices}
    for site in places.experts:
        for name, _, projection in site.linears():
            if name in places.matrices or is_below(name, places.damaged):
                held |= {f"{alias}.{projection.parameter}".lstrip(".") for alias in site.aliases}
    return held


def _spec(tensor: LazyTensor) -> PlaneSpec:
    return PlaneSpec(tuple(tensor.shape), tensor.dtype)
