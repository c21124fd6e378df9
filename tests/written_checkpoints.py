"""Checkpoints in the formats of others, for tests: out of models in memory, or out of other checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from checkpoint_directories import write_checkpoint
from tiny_models import tiny_config
from torch import Tensor, nn

from fxquant.checkpoint_contents import Contents, Fit, Matrix
from fxquant.checkpoint_files import CheckpointFiles, open_checkpoint
from fxquant.codecs import dequantize, quantize
from fxquant.expert_layouts import expert_weight
from fxquant.expert_modules import QExperts
from fxquant.experts import find_experts
from fxquant.families import find_weights
from fxquant.linears import find_linears
from fxquant.loading import load
from fxquant.modules import QLinear
from fxquant.pretrained import model_class, skeleton
from fxquant.scheme import PlaneSpec, Scheme
from fxquant.writers import WRITERS

Parts = dict[str, tuple[Scheme, dict[str, Tensor]]]


@dataclass(frozen=True)
class Source:
    """Contents and what is in them; a `Reader`."""

    contents: Contents
    parts: Parts
    tensors: Mapping[str, Tensor]

    def planes(self, matrix: str) -> dict[str, Tensor]:
        return self.parts[matrix][1]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def parts_of(model: nn.Module) -> Parts:
    """The matrices of a quantized model, by the names that checkpoints mostly have too."""
    found: Parts = {}
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            found[name] = module.scheme, module.planes
        elif isinstance(module, QExperts):
            for e, projection, scheme in module.matrices():
                if scheme is not None:
                    found[f"{name}.{e}.{projection.name}"] = scheme, module.planes_of(projection.name, e)
    return found


def shape_of(model: Any, name: str) -> tuple[int, int]:
    owner, _, projection = name.rpartition(".")
    if ".experts." in name:
        stack, _, e = owner.rpartition(".")
        n, k = model.get_submodule(stack).weight_of(projection, int(e)).shape
    else:
        n, k = model.get_submodule(name).weight.shape
    return n, k


def source_in(folder: Path) -> Source:
    """Of a checkpoint that `load` reads."""
    model: Any = load(folder, progress=False)
    files = open_checkpoint(folder)
    _, stored = find_weights(files)
    claimed = {piece.name for weight in stored for piece in weight.pieces.values()}
    tensors = {name: files.tensor(name) for name in files.headers if name not in claimed}
    parts = parts_of(model)
    matrices = {name: Matrix(name, name, *shape_of(model, name), scheme) for name, (scheme, _) in parts.items()}
    empty = skeleton(model_class(model.config), model.config)
    return Source(Contents(folder, model.config, empty, matrices, specs(tensors)), parts, tensors)


def quantized(kind: str, recipe: Mapping[str, str], dtype: torch.dtype = torch.float32) -> Source:
    """Of a tiny model with random weights: the scheme of a linear is that of the first pattern that fits its name."""
    from transformers import AutoModelForCausalLM

    config: Any = tiny_config(kind)
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = {site.name: site.weight.detach() for site in find_linears(model)}
    for site in find_experts(model):
        for name, e, projection in site.linears():
            weights[name] = expert_weight(site.module, site.layout, projection.name, e).detach()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{site.name}.")}
    parts: Parts = {}
    for name, weight in weights.items():
        scheme = next((scheme for pattern, scheme in recipe.items() if fnmatchcase(name, pattern)), None)
        if scheme is not None:
            parts[name] = Scheme.parse(scheme), quantize(weight, Scheme.parse(scheme))
            tensors.pop(f"{name}.weight", None)
    matrices = {name: Matrix(name, name, *weights[name].shape, scheme) for name, (scheme, _) in parts.items()}
    return Source(Contents(Path(kind), config, empty, matrices, specs(tensors)), parts, tensors)


def specs(tensors: Mapping[str, Tensor]) -> dict[str, PlaneSpec]:
    return {name: PlaneSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def fitted(source: Source, fits: Mapping[str, Fit]) -> Source:
    """What a writer is given: matrices in the schemes that it chose, or in full precision."""
    parts, tensors, matrices = dict(source.parts), dict(source.tensors), dict(source.contents.matrices)
    assert fits.keys() == matrices.keys()
    dtype = source.contents.config.dtype
    for name, fit in fits.items():
        old, (scheme, planes) = matrices[name], parts[name]
        weight = dequantize(planes, scheme, old.n, old.k)
        if fit.scheme is None:
            del parts[name], matrices[name]
            tensors[f"{name}.weight"] = weight.to(dtype)
            continue
        matrices[name] = replace(old, scheme=fit.scheme)
        if fit.scheme.weight_only == scheme.weight_only:
            parts[name] = fit.scheme, {plane: planes[plane] for plane in fit.scheme.planes(old.n, old.k)}
        else:
            parts[name] = fit.scheme, quantize(weight, fit.scheme)
    contents = replace(source.contents, matrices=matrices, plain=specs(tensors))
    return Source(contents, parts, tensors)


def write(source: Source, format: str, folder: Path) -> tuple[Source, CheckpointFiles]:
    """The directory of a checkpoint in a format; and what is in it."""
    writer = WRITERS[format]
    given = fitted(source, writer.fit(source.contents.matrices))
    tensors: dict[str, Tensor] = {}
    used: list[str] = []
    for unit in writer.units(given.contents):
        made = unit.make(given)
        assert specs(made) == dict(unit.tensors)
        assert not made.keys() & tensors.keys()
        used += unit.inputs
        tensors |= made
    assert sorted(used) == sorted([*given.contents.matrices, *given.contents.plain])
    config = given.contents.config.to_dict() | {"architectures": [type(given.contents.model).__name__]}
    config["dtype"] = str(given.contents.config.dtype).removeprefix("torch.")
    files = write_checkpoint(folder, tensors, writer.config(given.contents), **config)
    return given, files


def assert_same_weights(one: Parts, two: Parts, shapes: Mapping[str, Matrix]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        n, k = shapes[name].n, shapes[name].k
        first, second = (dequantize(planes, scheme, n, k) for scheme, planes in (one[name], two[name]))
        assert torch.equal(first, second), (name, one[name][0], two[name][0])


def assert_same_planes(one: Parts, two: Parts) -> None:
    assert {name: scheme for name, (scheme, _) in one.items()} == {name: scheme for name, (scheme, _) in two.items()}
    for name, (_, planes) in one.items():
        for plane, tensor in planes.items():
            assert torch.equal(bits(tensor), bits(two[name][1][plane])), (name, plane)


def bits(tensor: Tensor) -> Tensor:
    """Bytes: nan equals itself, and 0 is not -0."""
    return tensor.contiguous().view(-1).view(torch.uint8)
