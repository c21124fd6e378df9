"""The weights of a checkpoint in full precision, matrix by matrix, whatever its files hold, each read when needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from fxquant.codecs import dequantize
from fxquant.expert_layouts import ExpertsLayout, Projection, as_stack
from fxquant.experts import ExpertSite, find_experts
from fxquant.linears import LinearSite, find_linears
from fxquant.plain_tensors import Group, groups_of
from fxquant.scheme import PlaneSpec
from fxquant.stored_models import Stored


@dataclass(frozen=True)
class FullWeight:
    """One matrix `[N, K]`."""

    name: str
    """Of its module, as the checkpoint calls it; as the model does, where the checkpoint holds it with others."""
    sources: tuple[str, ...]
    """The plain tensors that hold it, alone or with others; none where it is quantized or tied."""
    tied: bool
    """It is another tensor of the model, which stays."""
    alone: bool
    """It is one plain tensor, `<name>.weight`, and nothing else is in that."""
    nbytes: int
    """That are read for it."""
    read: Callable[[], Tensor]
    """`[N, K]`, in the dtype that the model has it in."""


def full_weights(stored: Stored) -> dict[str, FullWeight]:
    """Every linear and every matrix of experts that the files hold, by what the model calls it.

    Args:
        stored: an opened checkpoint.

    Raises:
        FileError: tensors cannot be put together as transformers would.
    """
    return _Finder(stored).find()


@dataclass
class _Finder:
    stored: Stored
    _last: tuple[str, Tensor] | None = field(default=None)
    """A parameter that holds more than one matrix, and was read last."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _groups(self) -> dict[str, Group]:
        """How each tensor of the model is made of plain ones, by name."""
        specs = {name: PlaneSpec(tuple(t.shape), t.dtype) for name, t in self.stored.plain.items()}
        return {key: group for group in groups_of(self.stored.names, specs) for key in group.keys}

    @cached_property
    def _single(self) -> dict[str, str]:
        """Plain tensors that are one matrix of one expert, which transformers stacks: by the matrix."""
        names = [name for name in self.stored.plain if name.endswith(".weight")]
        found = ((self.stored.names.of_matrix(name.removesuffix(".weight")), name) for name in names)
        return {own: name for own, name in found if own is not None}

    def find(self) -> dict[str, FullWeight]:
        found: dict[str, FullWeight | None] = {}
        for linear in find_linears(self.stored.model):
            found[linear.name] = self._quantized(linear.name, linear.weight) or self._linear(linear)
        for site in find_experts(self.stored.model):
            for name, e, projection in site.linears():
                parameter = site.module.get_parameter(projection.parameter)
                found[name] = self._quantized(name, parameter) or self._expert(site, name, e, projection, parameter)
        return {name: weight for name, weight in found.items() if weight is not None}

    def _quantized(self, own: str, place: Tensor) -> FullWeight | None:
        stored = self.stored.matrices.get(own)
        if stored is None:
            return None

        def read() -> Tensor:
            scheme, planes = self.stored.planes(own)
            return dequantize(planes, scheme, *self.stored.shapes[own], place.dtype)

        return FullWeight(stored.name, (), False, False, self.stored.nbytes(own), read)

    def _linear(self, site: LinearSite) -> FullWeight | None:
        names = [f"{alias}.weight" for alias in site.aliases]
        keys = [name for name in names if name in self._groups]
        ties: Mapping[str, str] = getattr(self.stored.model, "all_tied_weights_keys", {})
        tied = not keys
        keys = keys or [ties[name] for name in names if ties.get(name) in self._groups]
        if not keys:
            return None
        group, dtype = self._groups[keys[0]], site.weight.dtype
        alone = group.by_name and group.sources[0].endswith(".weight") and not tied
        name = group.sources[0].removesuffix(".weight") if alone else site.name

        def read() -> Tensor:
            weight = self._parameter(keys[0], shared=False).to(dtype)
            return weight.t() if site.transposed else weight

        sources, nbytes = () if tied else group.sources, self._nbytes(group.sources) // len(group.keys)
        return FullWeight(name, sources, tied, alone, nbytes, read)

    def _expert(self, site: ExpertSite, own: str, e: int, projection: Projection, place: Tensor) -> FullWeight | None:
        if own in self._single:
            name = self._single[own]
            tensor = self.stored.plain[name]
            return FullWeight(
                name.removesuffix(".weight"), (name,), False, True, tensor.nbytes, lambda: tensor[...].to(place.dtype)
            )
        keys = [f"{alias}.{projection.parameter}".lstrip(".") for alias in site.aliases]
        key = next((key for key in keys if key in self._groups), None)
        if key is None:
            return None
        group, layout = self._groups[key], site.layout
        share = self._nbytes(group.sources) // (layout.experts * projection.parts)

        def read() -> Tensor:
            matrix = self._slice(key, layout, projection.parameter, e, place)
            return matrix[projection.rows(matrix.shape[0])].to(place.dtype)

        return FullWeight(own, group.sources, False, False, share, read)

    def _slice(self, key: str, layout: ExpertsLayout, parameter: str, e: int, place: Tensor) -> Tensor:
        """All rows of one expert in a parameter; of one that is in the files as it is, nothing else is read."""
        group = self._groups[key]
        headers: Mapping[str, Any] = self.stored.source.headers
        if place.dim() == 3 and group.by_name and group.sources[0] in headers:
            one = self.stored.source.tensor(group.sources[0], e)
            return one.t() if layout.parts(parameter)[0].transposed else one
        return as_stack(self._parameter(key), layout, parameter)[e]

    def _parameter(self, key: str, shared: bool = True) -> Tensor:
        """A parameter, as transformers makes it; the last one that holds more than one matrix is kept."""
        group = self._groups[key]
        if group.by_name and not shared:
            return self.stored.plain[group.sources[0]][...]
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = None
                self._last = key, group.make(self.stored.names, lambda name: self.stored.plain[name][...])[key]
            return self._last[1]

    def _nbytes(self, names: tuple[str, ...]) -> int:
        return sum(self.stored.plain[name].nbytes for name in names)
