"""`load(path)`: a model out of a quantized checkpoint in any format that is known, planes as the files hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_sources import CheckpointSource, open_source
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import CheckpointError, FileError, FxquantError
from fxquant.expert_layouts import expert_weight
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, find_experts
from fxquant.linears import LinearSite, find_linears
from fxquant.model_files import is_model_directory, read_model
from fxquant.modules import QLinear
from fxquant.pretrained import as_file_error, check_size, model_class, skeleton
from fxquant.progress import bytes_progress
from fxquant.scheme import Scheme
from fxquant.transformers_weights import Names


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
        return model if dtype is None else model.to(dtype)
    source = open_source(path, dtype)
    try:
        return _load(source, torch.device(device), progress)
    finally:
        source.close()


def _load(source: CheckpointSource, device: torch.device, progress: bool) -> nn.Module:
    model: Any = skeleton(model_class(source.config), source.config, tensors=len(source.headers))
    check_size(model, sum(header.nbytes for header in source.headers.values()), str(source.path))
    names, stored = Names(model), source.weights(model)
    places = _places(source, names, stored)
    plain = source.plain(model, {piece.name for weight in stored for piece in weight.pieces.values()})
    linears = {site.name: site for site in find_linears(model)}
    total = sum(map(source.nbytes, stored))
    with bytes_progress("loading", total, enabled=progress) as done:
        for name in [name for name in places if name in linears]:
            _install_linear(source, model, linears[name], places[name], device)
            done(source.nbytes(places[name]), name)
        for site in find_experts(model):
            own = {name: places[name] for name, _, _ in site.linears() if name in places}
            if own:
                for used in _install_experts(source, model, site, own, _kept(names, plain), device):
                    del plain[used]
                done(sum(map(source.nbytes, own.values())), site.name)
        missing, unexpected = names.load(plain, device)
    _refuse("lacks weights of the model", source.path, missing)
    _refuse("holds tensors that the model does not have", source.path, unexpected)
    _load_generation_config(model, source.path)
    result: nn.Module = model.to(device).eval()
    return result


def _places(source: CheckpointSource, names: Names, stored: Iterable[StoredWeight]) -> dict[str, StoredWeight]:
    """What the model calls each quantized matrix."""
    places: dict[str, StoredWeight] = {}
    lost = []
    for weight in stored:
        name = names.of_matrix(weight.name)
        if name is None:
            lost.append(weight.name)
        elif name in places:
            raise FileError(f"{source.path}: {weight.name} and {places[name].name} are both {name} of the model")
        else:
            places[name] = weight
    _refuse("holds quantized weights that the model has no linear for", source.path, lost)
    return places


def _refuse(fault: str, path: Path, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = ", ..." if len(found) > 5 else ""
        raise FileError(f"{path} {fault}: {len(found)}\n  {', '.join(found[:5])}{more}")


def _read(
    source: CheckpointSource, weight: StoredWeight, n: int, k: int, device: torch.device
) -> tuple[Scheme, dict[str, Tensor]]:
    tensors = {own: source.tensor(piece.name, piece.index) for own, piece in weight.pieces.items()}
    try:
        scheme, planes = weight.read(tensors, n, k)
    except FxquantError as error:
        raise CheckpointError(f"{weight.name} in {source.path}: {error}") from error
    return scheme, {name: plane.to(device) for name, plane in planes.items()}


def _install_linear(
    source: CheckpointSource, model: nn.Module, site: LinearSite, weight: StoredWeight, device: torch.device
) -> None:
    if site.obstacle is not None:
        raise FileError(f"{source.path}: {weight.name} is quantized, and cannot be put into the model: {site.obstacle}")
    scheme, planes = _read(source, weight, site.n, site.k, device)
    new = QLinear.replacing(site.module, scheme, transposed=site.transposed)
    new.load_planes(planes)
    for alias in site.aliases:
        model.set_submodule(alias, new)


def _install_experts(
    source: CheckpointSource,
    model: nn.Module,
    site: ExpertSite,
    own: Mapping[str, StoredWeight],
    kept: Mapping[str, tuple[str, Any]],
    device: torch.device,
) -> set[str]:
    """Put the experts of one layer in place; returns the names of plain tensors that went into them."""
    found: dict[tuple[int, str], tuple[Scheme, dict[str, Tensor]]] = {}
    for name, e, projection in site.linears():
        if name in own:
            n, k = expert_weight(site.module, site.layout, projection.name, e).shape
            found[e, projection.name] = _read(source, own[name], n, k, device)
    new = QExperts(site.module, site.layout, {key: scheme for key, (scheme, _) in found.items()})
    used = set()
    for name, e, projection in site.linears():
        if (e, projection.name) in found:
            new.load_planes(projection.name, e, found.pop((e, projection.name))[1])
        elif not new.keeps_parameter(projection.name):
            _refuse("lacks weights of the model", source.path, [] if name in kept else [name])
            stored, tensor = kept[name]
            new.load_planes(projection.name, e, {"weight": tensor[...].to(device, new.dtype)})
            used.add(stored)
    for alias in site.aliases:
        model.set_submodule(alias, new)
    return used


def _kept(names: Names, plain: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Matrices that are not quantized, by what the model calls them: name and tensor in the files."""
    found = ((names.of_matrix(name.removesuffix(".weight")), name) for name in plain if name.endswith(".weight"))
    return {own: (name, plain[name]) for own, name in found if own is not None}


def _load_generation_config(model: Any, path: Path) -> None:
    folder = path if path.is_dir() else path.parent
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with as_file_error(f"cannot read the generation config in {folder}"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
