"""Checkpoints in fxquant's own format, unit by unit: the files that `fxquant.model_files.save` writes of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_contents import Contents, Matrix, Reader, Unit
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, find_experts
from fxquant.linears import LinearSite, find_linears
from fxquant.model_files import build
from fxquant.model_index import FORMAT, index_from, index_parts
from fxquant.plain_tensors import Group, empty, groups_of
from fxquant.scheme import PlaneSpec
from fxquant.stored_matrices import refuse
from fxquant.transformers_weights import Names


@dataclass(frozen=True)
class OwnFormat:
    """What becomes of contents in the own format."""

    contents: Contents
    recipe: str
    """For people: what they were quantized by."""

    @cached_property
    def model(self) -> nn.Module:
        """The quantized model on the meta device, every tensor in the shape and dtype that it has in the files.

        Raises:
            FileError: tensors are missing, have no place in the model, or do not fit it.
        """
        model = self._skeleton
        plain = {name: empty(spec) for name, spec in self._plain.items()}
        missing, unexpected = Names(model).load(plain, torch.device("meta"))
        refuse("lacks weights of the model", self.contents.path, missing)
        refuse("holds tensors that the model does not have", self.contents.path, unexpected)
        return model

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `fxquant.json`."""
        first = self._first_names
        shared = {name: first[id(tensor)] for name, tensor in self._state.items() if first[id(tensor)] != name}
        return {**self._quantized, "shared": shared}

    def units(self) -> Iterator[Unit]:
        """Every tensor of the files.

        Raises:
            FileError: tensors are missing, have no place in the model, or do not fit it.
        """
        first = self._first_names
        left = {name: tensor for name, tensor in self._state.items() if first[id(tensor)] == name}
        for unit in (*self._linear_units(), *self._expert_units()):
            yield unit
            for name in unit.tensors:
                del left[name]
        names = Names(self.model)
        for group in groups_of(names, self._plain):
            wanted = {key: left.pop(key) for key in group.keys if key in left}
            yield Unit(group.sources, _specs(wanted), partial(_make_plain, names, group, wanted))
        for name, tensor in left.items():  # what the model computes
            yield Unit((), _specs({name: tensor}), partial(_make_computed, {name: tensor}))

    @cached_property
    def _own(self) -> dict[str, Matrix]:
        return {matrix.own: matrix for matrix in self.contents.matrices.values()}

    @cached_property
    def _linears(self) -> list[tuple[LinearSite, Matrix]]:
        sites = find_linears(self.contents.model)
        return [(site, self._own[name]) for site in sites for name in site.aliases if name in self._own]

    @cached_property
    def _experts(self) -> list[ExpertSite]:
        sites = find_experts(self.contents.model)
        return [site for site in sites if any(name in self._own for name, _, _ in site.linears())]

    @cached_property
    def _quantized(self) -> dict[str, Any]:
        linears = {
            alias: (matrix.scheme, site.weight.dtype) for site, matrix in self._linears for alias in site.aliases
        }
        experts = {
            alias: (
                {(e, p.name): self._own[name].scheme if name in self._own else None for name, e, p in site.linears()},
                site.module.get_parameter(site.layout.projections[0].parameter).dtype,
            )
            for site in self._experts
            for alias in site.aliases
        }
        kind = type(self.contents.model).__name__
        parts = index_parts(linears, experts)
        return {"format": FORMAT, "model": kind, "recipe": self.recipe, "shared": {}, **parts}

    @cached_property
    def _skeleton(self) -> nn.Module:
        return build(self.contents.config, index_from(self._quantized, str(self.contents.path)))

    @cached_property
    def _kept(self) -> dict[str, str]:
        """Matrices that stay as they are among quantized ones: what the model calls them, and the contents.

        Raises:
            FileError: some are not there.
        """
        inside = set()
        for site in self._experts:
            module = self._skeleton.get_submodule(site.name)
            assert isinstance(module, QExperts)
            for name, e, p in site.linears():
                if module.scheme_of(p.name, e) is None and not module.keeps_parameter(p.name):
                    inside.add(name)
        names, found = Names(self.contents.model), {}
        for name in self.contents.plain if inside else ():
            own = names.of_matrix(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if own in inside:
                found[own] = name
        refuse("lacks weights of the model", self.contents.path, inside - found.keys())
        return found

    @cached_property
    def _plain(self) -> dict[str, PlaneSpec]:
        kept = set(self._kept.values())
        return {name: spec for name, spec in self.contents.plain.items() if name not in kept}

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    @cached_property
    def _first_names(self) -> dict[int, str]:
        """The first name of every tensor."""
        return {id(tensor): name for name, tensor in reversed(self._state.items())}

    def _linear_units(self) -> Iterator[Unit]:
        for site, matrix in self._linears:
            specs = matrix.scheme.planes(matrix.n, matrix.k)
            tensors = {f"{site.name}.{plane}": spec for plane, spec in specs.items()}
            yield Unit((matrix.name,), tensors, partial(_make_linear, site.name, matrix))

    def _expert_units(self) -> Iterator[Unit]:
        for site in self._experts:
            module = self.model.get_submodule(site.name)
            assert isinstance(module, QExperts)
            stacks = [stack for stack in module.stacks if not stack.whole]
            own = {name for stack in stacks for name in stack.tensors}
            found = {name: t for name, t in module.state_dict(keep_vars=True).items() if name in own}
            inputs = {}
            for name, e, p in site.linears():
                if name in self._own:
                    inputs[e, p.name] = self._own[name].name
                elif name in self._kept:
                    inputs[e, p.name] = self._kept[name]
            tensors = _specs({f"{site.name}.{name}": tensor for name, tensor in found.items()})
            yield Unit(tuple(inputs.values()), tensors, partial(_make_experts, site, module, inputs, list(found)))


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, PlaneSpec]:
    return {name: PlaneSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _make_linear(name: str, matrix: Matrix, reader: Reader) -> dict[str, Tensor]:
    return {f"{name}.{plane}": tensor for plane, tensor in reader.planes(matrix.name).items()}


def _make_experts(
    site: ExpertSite, empty_module: QExperts, inputs: Mapping[tuple[int, str], str], tensors: list[str], reader: Reader
) -> dict[str, Tensor]:
    schemes = {(e, p.name): empty_module.scheme_of(p.name, e) for _, e, p in site.linears()}
    module = QExperts(site.module, site.layout, schemes)
    module.dtype = empty_module.dtype
    for (e, projection), name in inputs.items():
        scheme = schemes[e, projection]
        planes = {"weight": reader.tensor(name).to(module.dtype)} if scheme is None else reader.planes(name)
        module.load_planes(projection, e, planes)
    return {f"{site.name}.{name}": getattr(module, name).detach() for name in tensors}


def _make_plain(names: Names, group: Group, wanted: Mapping[str, Tensor], reader: Reader) -> dict[str, Tensor]:
    made = group.make(names, reader.tensor) if wanted else {}
    return {name: made[name].to(tensor.dtype) for name, tensor in wanted.items()}


def _make_computed(tensors: Mapping[str, Tensor], reader: Reader) -> Mapping[str, Tensor]:
    return tensors
