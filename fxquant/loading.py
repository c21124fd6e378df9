"""`load(path)`: a model out of a quantized checkpoint in any format that is known, planes as the files hold them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_sources import CheckpointSource, open_source
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import FileError
from fxquant.expert_layouts import expert_weight
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, find_experts
from fxquant.integrations.transformers import attach
from fxquant.linears import LinearSite, find_linears
from fxquant.model_files import is_model_directory, read_model
from fxquant.modules import QLinear
from fxquant.own_source import is_own
from fxquant.pretrained import (
    as_file_error,
    check_size,
    load_config,
    load_generation_config,
    model_class,
    skeleton,
)
from fxquant.progress import bytes_progress
from fxquant.scheme import Scheme
from fxquant.stored_matrices import read_matrix, refuse, stored_matrices
from fxquant.transformers_weights import Names, untie


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> nn.Module:
    """A model whose quantized weights are planes, out of a checkpoint.

    The library that made it is not needed, and no full-precision copy of a quantized weight ever exists.

    Args:
        path: directory of a checkpoint, quantized by any producer that is known, by fxquant, or not at all; or a GGUF
            file.
        device: where the model goes, tensor by tensor.
        dtype: of everything that is not planes; the config's by default.
        progress: show a progress bar on stderr.

    Returns:
        The model in eval mode, ready for `torch.compile`; `fxquant.report` tells what is in it.

    Raises:
        FileError: the files cannot be read, contradict each other, or do not fit the model of their config.
        CheckpointError: a quantized weight is not what its format says.
    """
    if is_model_directory(path):
        model = read_model(path).to(device)
        model = model if dtype is None else model.to(dtype)
    elif is_own(path):  # by transformers, which knows how
        kind: Any = model_class(load_config(path))
        with as_file_error(f"cannot load {path}"):
            model = kind.from_pretrained(path, dtype=dtype or "auto").to(device)
    else:
        model = _load(open_source(path, dtype), torch.device(device), progress)
    attach(model)
    return model


def _load(source: CheckpointSource, device: torch.device, progress: bool) -> nn.Module:
    model: Any = skeleton(model_class(source.config), source.config, tensors=len(source.headers))
    check_size(model, sum(header.nbytes for header in source.headers.values()), str(source.path))
    names = Names(model)
    places = stored_matrices(source, names)
    plain = source.plain(model, {piece.name for weight in places.values() for piece in weight.pieces.values()})
    linears = {site.name: site for site in find_linears(model)}
    total = sum(map(source.nbytes, places.values()))
    with bytes_progress("loading", total, enabled=progress) as done:
        for name in [name for name in places if name in linears]:
            _install_linear(source, model, linears[name], places[name], device)
            done(source.nbytes(places[name]), name)
        kept = functools.cache(lambda: _kept(names, plain))
        for site in find_experts(model):
            own = {name: places[name] for name, _, _ in site.linears() if name in places}
            if own:
                for used in _install_experts(source, model, site, own, kept, device):
                    del plain[used]
                done(sum(map(source.nbytes, own.values())), site.name)
        untie(model)
        missing, unexpected = names.load(plain, device)
    refuse("lacks weights of the model", source.path, missing)
    refuse("holds tensors that the model does not have", source.path, unexpected)
    generation_config = load_generation_config(source.path if source.path.is_dir() else source.path.parent)
    if generation_config is not None:
        model.generation_config = generation_config
    result: nn.Module = model.to(device).eval()
    return result


def _install_linear(
    source: CheckpointSource, model: nn.Module, site: LinearSite, weight: StoredWeight, device: torch.device
) -> None:
    if site.obstacle is not None:
        raise FileError(f"{source.path}: {weight.name} is quantized, and cannot be put into the model: {site.obstacle}")
    scheme, planes = read_matrix(source, weight, site.n, site.k)
    new = QLinear.replacing(site.module, scheme, transposed=site.transposed)
    new.load_planes({name: plane.to(device) for name, plane in planes.items()})
    for alias in site.aliases:
        model.set_submodule(alias, new)


def _install_experts(
    source: CheckpointSource,
    model: nn.Module,
    site: ExpertSite,
    own: Mapping[str, StoredWeight],
    kept: Callable[[], Mapping[str, tuple[str, Any]]],
    device: torch.device,
) -> set[str]:
    """Put the experts of one layer in place; returns the names of plain tensors that went into them."""
    found: dict[tuple[int, str], tuple[Scheme, dict[str, Tensor]]] = {}
    for name, e, projection in site.linears():
        if name in own:
            n, k = expert_weight(site.module, site.layout, projection.name, e).shape
            scheme, planes = read_matrix(source, own[name], n, k)
            found[e, projection.name] = scheme, {name: plane.to(device) for name, plane in planes.items()}
    new = QExperts(site.module, site.layout, {key: scheme for key, (scheme, _) in found.items()})
    used = set()
    for name, e, projection in site.linears():
        if (e, projection.name) in found:
            new.load_planes(projection.name, e, found.pop((e, projection.name))[1])
        elif not new.keeps_parameter(projection.name):
            refuse("lacks weights of the model", source.path, [] if name in kept() else [name])
            stored, tensor = kept()[name]
            new.load_planes(projection.name, e, {"weight": tensor[...].to(device, new.dtype)})
            used.add(stored)
    for alias in site.aliases:
        model.set_submodule(alias, new)
    return used


def _kept(names: Names, plain: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Matrices that are not quantized, by what the model calls them: name and tensor in the files."""
    found = ((names.of_matrix(name.removesuffix(".weight")), name) for name in plain if name.endswith(".weight"))
    return {own: (name, plain[name]) for own, name in found if own is not None}
