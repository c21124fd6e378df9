"""Quantizing a model while its weights arrive, one by one: each becomes planes as soon as it is there.

The planes are those that `fxquant.quantize` makes of the same weights: the code is the same. What cannot be quantized
by itself, such as a weight that is tied to another, is quantized when everything is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxquant.codecs import all_finite, check_values
from fxquant.errors import ModelError, SchemeError
from fxquant.expert_containers import held_parameters
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, expert_weight, find_experts
from fxquant.install import (
    Record,
    check_weights,
    empty_experts,
    fill_experts,
    install,
    install_linear,
    linear_weight,
    place,
    record_of,
    remember,
)
from fxquant.integrations.model_parts import mark_initialised
from fxquant.modules import QLinear
from fxquant.plans import Plan, PlanEntry
from fxquant.rewrite import History

_NEW = "it is not in the checkpoint: newly initialised weights stay as they are"


@dataclass
class _Experts:
    """The experts of one module, on their way."""

    site: ExpertSite
    planned: Mapping[str, PlanEntry]
    """Those of their matrices that get a scheme, by name."""
    waiting: set[str]
    """Names of the parameters of these that have not come yet."""
    others: set[str]
    """Names of the other parameters of the experts: biases, and what stays as it is."""
    new: QExperts | None = None

    def within(self, name: str) -> str:
        """What the module of experts calls a parameter."""
        return name.removeprefix(f"{self.site.name}.")


class Arrivals:
    """What is to be quantized of a model whose weights are on the meta device, and what became of it.

    Attributes:
        record: what is left on the model.
        missing: names of parameters that have not come; those that are quantized are taken out. None: none of those
            that are awaited has come, so that nothing is known of the others.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, history: History, dtype: torch.dtype, tied: Mapping[str, str]
    ) -> None:
        """Find out which weights can be quantized as they come.

        Args:
            model: as `plan` was made for it; modules change as weights come.
            plan: which weight gets which scheme.
            history: left on the model.
            dtype: in which weights come; those that the model has in another are quantized in the end.
            tied: parameters that are tied in the end, as `target: source`.
        """
        self.model, self.record = model, Record(plan, history)
        self.missing: set[str] | None = None
        self._dtype, self._tied = dtype, {*tied, *tied.values()}
        self._parameters: dict[str, list[str]] = {}  # by planned weight: the parameters that hold it
        self._linears: dict[str, PlanEntry] = {}
        self._experts: dict[str, _Experts] = {}
        self._mismatched: dict[str, torch.Size] = {}  # shapes that the model has
        self._faults: dict[str, str] = {}
        sites = {name: (site, p) for site in find_experts(model) for name, _, p in site.linears()}
        together: dict[ExpertSite, dict[str, PlanEntry]] = {}
        for entry in plan.quantized:
            if entry.name in sites:
                site, projection = sites[entry.name]
                self._parameters[entry.name] = [f"{alias}.{projection.parameter}" for alias in site.aliases]
                together.setdefault(site, {})[entry.name] = entry
                continue
            names = [f"{alias}.weight" for alias in entry.aliases or (entry.name,)]
            self._parameters[entry.name] = names
            if self._comes_alone(names):
                self._linears[names[0]] = entry
        for site, planned in together.items():
            self._await_experts(site, planned)
        self._sizes: dict[str, tuple[int, int]] = {}  # by parameter: bytes and elements of what is planned in it
        for entry in plan.quantized:
            name = self._parameters[entry.name][0]
            nbytes, elements = self._sizes.get(name, (0, 0))
            self._sizes[name] = (nbytes + entry.bytes_after, elements + math.prod(entry.shape))

    def _comes_alone(self, names: list[str]) -> bool:
        return len(names) == 1 and names[0] not in self._tied and self._has_dtype(names)

    def _has_dtype(self, names: Iterable[str]) -> bool:
        return all(self.model.get_parameter(name).dtype == self._dtype for name in names)

    def _await_experts(self, site: ExpertSite, planned: Mapping[str, PlanEntry]) -> None:
        held = {f"{site.name}.{name}" for name in held_parameters(site.layout)}
        stored = {self._parameters[name][0] for name in planned}
        one = _Experts(site, planned, set(stored), held - stored)
        # What stays as it is and belongs to a child gets another name when the experts are replaced.
        moves = any("." in one.within(name) for name in one.others)
        if len(site.aliases) == 1 and not moves and not held & self._tied and self._has_dtype(held):
            self._experts |= dict.fromkeys(stored, one)

    def awaits(self, name: str) -> bool:
        """Whether a parameter is to be quantized when it comes."""
        return name in self._linears or name in self._experts

    def element_size(self, name: str) -> float | None:
        """Bytes per element that a parameter takes as planes; None for one that is not awaited."""
        if not self.awaits(name):
            return None
        whole = self._place(name).numel()
        nbytes, planned = self._sizes[name]
        return (nbytes + (whole - planned) * self._dtype.itemsize) / max(whole, 1)

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter that is awaited."""
        return max((self._place(name).nbytes for name in (*self._linears, *self._experts)), default=0)

    def take(self, name: str, value: Tensor, missing: set[str]) -> bool:
        """Quantize a parameter that has come.

        Args:
            name: of a parameter.
            value: of the checkpoint, in the dtype and on the device that it is to have.
            missing: names of the parameters that have not come; kept.

        Returns:
            False where it is to become the model's parameter as it is.
        """
        self.missing = missing
        if not self.awaits(name):
            return False
        owner, leaf = self._owner(name)
        empty = owner.get_parameter(leaf)
        if value.shape != empty.shape or value.dtype != empty.dtype:
            begun = self._refuse(name, f"comes as {value.dtype} {list(value.shape)}")
            if value.shape != empty.shape and not begun:
                self._mismatched[name] = empty.shape
            return begun
        owner._parameters[leaf] = nn.Parameter(value)
        try:
            fault = self._fault(name)
            if fault:
                return self._refuse(name, fault, is_fault=True)
            self._install(name, missing)
        finally:
            owner._parameters[leaf] = empty  # whoever has a reference to the old module holds no weight by it
        return True

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        one = self._experts.get(name)
        path, _, leaf = (one.within(name) if one else name).rpartition(".")
        return (one.site.module if one else self.model).get_submodule(path), leaf

    def _place(self, name: str) -> Tensor:
        owner, leaf = self._owner(name)
        return owner.get_parameter(leaf)

    def _refuse(self, name: str, what: str, *, is_fault: bool = False) -> bool:
        """Leave a parameter to the model; experts that are begun cannot be left, and make loading fail in the end."""
        one = self._experts.get(name)
        begun = one is not None and one.new is not None
        if begun or is_fault:
            self._faults[name] = what
        if one is not None:
            for other in one.waiting:
                self._experts.pop(other, None)
        self._linears.pop(name, None)
        return begun

    def _weights(self, name: str) -> Iterator[tuple[PlanEntry, Tensor]]:
        """The planned matrices of a parameter that is there, `[N, K]`."""
        if name in self._linears:
            yield self._linears[name], linear_weight(self.model, self._linears[name])
            return
        one = self._experts[name]
        for matrix, e, p in one.site.linears():
            if matrix in one.planned and p.parameter == one.within(name):
                yield one.planned[matrix], expert_weight(one.site.module, one.site.layout, p.name, e).detach()

    def _fault(self, name: str) -> str | None:
        for entry, weight in self._weights(name):
            if not all_finite(weight):
                return "holds inf or nan, which no scheme can store"
            assert entry.scheme is not None
            try:
                check_values(weight, entry.scheme, entry.scale)
            except SchemeError as error:
                return str(error)
        return None

    def _install(self, name: str, missing: set[str]) -> None:
        missing.discard(name)
        entry = self._linears.pop(name, None)
        if entry is not None:
            self.record.errors[entry.name] = install_linear(self.model, entry)
            new = self.model.get_submodule(entry.name)
            assert isinstance(new, QLinear)
            mark_initialised(new)
            return
        one = self._experts[name]
        if one.new is None:
            missing -= one.waiting  # names that the model does not have any more
            one.new = empty_experts(one.site, one.planned)
            mark_initialised(one.new)
            place(self.model, one.site.aliases, one.new)
        for planned, error in fill_experts(one.site, one.planned, one.new, one.within(name)):
            self.record.errors[planned.name] = error
        one.waiting.discard(name)

    def finish(self) -> None:
        """Quantize what could not be quantized by itself, and leave the record on the model.

        Raises:
            ModelError: weights cannot be stored, are missing where they must not, or are not here but offloaded; or
                nothing of all that is planned has come.
        """
        self._check()
        record = self.record
        rest = [e for e in record.plan.quantized if e.name not in record.errors]
        missing = {*self._linears, *self._experts} if self.missing is None else self.missing
        gone = (missing - self._tied) | self._mismatched.keys()
        new = {e.name for e in rest if gone.issuperset(self._parameters[e.name])}
        late = [e for e in rest if e.name not in new]
        if not record.errors and not late:
            raise ModelError(
                f"none of the {len(rest)} weights that are to be quantized is in the checkpoint, such as "
                f"{rest[0].name}\n  is it a checkpoint of another model, or quantized by something unknown?"
            )
        if late:
            self._install_late(late)
        entries = tuple(_kept(e) if e.name in new else e for e in record.plan.entries)
        record.plan = replace(record.plan, entries=entries)
        remember(self.model, record)

    def _check(self) -> None:
        begun = {id(one): one for one in self._experts.values() if one.new is not None}.values()
        for one in begun:
            for name in one.waiting | (one.others & (self.missing or set())):
                self._faults.setdefault(name, "is not in the checkpoint, the other weights of these experts are")
        for name, shape in self._mismatched.items():
            # transformers refuses it, or makes a new weight; before 5.23 it took what came.
            if (found := self.model.get_parameter(name).shape) != shape:
                self._faults.setdefault(name, f"is {list(found)}, the model has {list(shape)}")
        if self._faults:
            listed = [f"{name} {what}" for name, what in sorted(self._faults.items())]
            raise ModelError(
                f"{len(listed)} weights of the checkpoint cannot be quantized: {'; '.join(listed[:3])}"
                f"{'; ...' if len(listed) > 3 else ''}\n  mend these weights, or let a rule of the recipe keep them"
            )

    def _install_late(self, late: list[PlanEntry]) -> None:
        away = [n for e in late for n in self._parameters[e.name][:1] if self.model.get_parameter(n).is_meta]
        if away:
            raise ModelError(
                f"{', '.join(away[:3])} cannot be quantized: device_map has offloaded it, and it is no weight that can "
                "be quantized as it is loaded, since it is tied or has a dtype of its own\n"
                "  leave it out of the recipe, or give a device_map that keeps it on a device"
            )
        plan = replace(self.record.plan, entries=tuple(late))
        check_weights(self.model, plan)
        install(self.model, plan, self.record.history, {}, lambda entry: None)
        found = record_of(self.model)
        assert found is not None
        self.record.errors.update(found.errors)


def _kept(entry: PlanEntry) -> PlanEntry:
    return replace(entry, scheme=None, bytes_after=entry.bytes_before, reason=_NEW)
