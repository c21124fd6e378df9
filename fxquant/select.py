"""The recipe applied to a model: which weight becomes what, and why. Touches nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxquant import dataflow
from fxquant.codecs import ScaleSearch, check_search
from fxquant.errors import FxquantError, ModelError, SchemeError
from fxquant.expert_plans import matrices, plan_experts
from fxquant.experts import ExpertSite, find_unread_experts
from fxquant.linears import LinearSite, StackedWeight
from fxquant.plans import Plan, PlanEntry
from fxquant.recipe import Recipe
from fxquant.scheme import Scheme
from fxquant.unused_rules import unmatched


@dataclass(frozen=True)
class _Decision:
    """What becomes of one linear."""

    scheme: Scheme | None = None
    rule: int | None = None
    reason: str = ""
    scale: ScaleSearch = "least_squares"
    error: FxquantError | None = None
    """Why the recipe cannot be followed here; the plan is refused."""


def select(
    model: nn.Module,
    recipe: Recipe,
    sites: Sequence[LinearSite],
    experts: Sequence[ExpertSite],
    stacked: Sequence[StackedWeight],
    graph: fx.GraphModule | None,
    no_graph: str = "",
) -> Plan:
    """Decide for every linear of `sites`, every matrix of `experts` and every other matmul weight of `model`.

    Args:
        model: the model, for its output embeddings and tied weights.
        recipe: the rules; the first that reaches a linear decides.
        sites: its linears, in order.
        experts: its modules that hold stacked experts.
        stacked: its parameters of three or more dimensions, those of experts too.
        graph: the captured graph, which tells routers and weights that other code reads; None falls back on structure.
        no_graph: why there is no graph.

    Raises:
        RecipeError: a rule decides nothing.
        SchemeError: a layer cannot hold the scheme that a rule names, and the recipe says that this is an error.
        RecipeError: rules reach some of the experts of one module and say nothing of the others.
        ModelError: a rule spells a weight that cannot be replaced.
    """
    tied = _tied(model, sites)
    guards = _protected(model, sites, tied, graph)
    obstacles = _obstacles(sites)
    decisions = [_decide(recipe, s, guards.get(s.name), obstacles.get(s.name), s.name in tied) for s in sites]
    planned = plan_experts(recipe, experts)
    used = {one.rule for one in decisions if one.rule is not None} | planned.used
    entries = [_linear_entry(recipe, s, one, s.name in tied) for s, one in zip(sites, decisions, strict=True)]
    entries += planned.entries
    read, unread = matrices(experts), find_unread_experts(model)
    entries += [_stacked_entry(recipe, weight, used, unread) for weight in stacked if weight.name not in read]
    if graph is not None:
        known = {weight.name for weight in stacked}
        bare = dataflow.bare_matmuls(graph, sites)
        entries += [_bare_entry(model, name, where) for name, where in bare.items() if name not in known]
    _refuse([one.error for one in decisions if one.error is not None] + list(planned.errors))
    error = unmatched(recipe, used, [site.name for site in sites] + [e.name for e in planned.entries])
    if error is not None:
        raise error
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    entries.sort(key=lambda e: order.get(_owner(e), -1))
    counted = sum(e.bytes_before for e in entries)
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return Plan(tuple(entries), str(recipe), "captured" if graph is not None else no_graph, max(total - counted, 0))


def _owner(entry: PlanEntry) -> str:
    """Name of the module that holds a weight."""
    if entry.kind == "expert":
        return entry.name.rsplit(".", 2)[0]
    return entry.name if entry.kind == "linear" else entry.name.rpartition(".")[0]


def _decide(recipe: Recipe, site: LinearSite, guard: str | None, obstacle: str | None, tied: bool) -> _Decision:
    size = site.n * site.k
    for name in site.aliases:
        found = recipe.decide(name, type(site.module), size, protected=guard is not None)
        if found is not None:
            break
    else:
        guarded = f"protected: {guard}" if guard and recipe.defaults else None
        return _Decision(reason=guarded or obstacle or "no rule matches")
    index, rule = found
    if rule.scheme is None:
        return _Decision(None, index, "the rule keeps it")
    if tied and rule.optional:  # a preset's rule: it is there to save memory, and here it would cost some
        return _Decision(None, index, f"{guard}: planes of its own would come on top")
    if obstacle:
        spelled = rule.spells(name) or not site.name
        error = ModelError(f"{site.name or 'the model'} cannot be quantized: {obstacle}") if spelled else None
        return _Decision(None, index, obstacle, error=error)
    try:
        scheme, reason = recipe.fit(site.name, rule.scheme, site.n, site.k)
        if scheme is not None:
            check_search(scheme, rule.scale or recipe.scale)
    except SchemeError as error:
        return _Decision(None, index, error=error)
    if tied:
        reason = "; ".join(filter(None, [reason, f"untied, the planes come on top: {guard}"]))
    return _Decision(scheme, index, reason, rule.scale or recipe.scale)


def _refuse(errors: Sequence[FxquantError]) -> None:
    if errors:
        more = f"\n  and {len(errors) - 1} more weights likewise" if len(errors) > 1 else ""
        raise type(errors[0])(f"{errors[0]}{more}")


def _protected(
    model: nn.Module, sites: Sequence[LinearSite], tied: Mapping[str, str], graph: fx.GraphModule | None
) -> dict[str, str]:
    """Linears that only a rule that spells their name reaches, with the reason; the first reason found stands."""
    by_module = {site.module: site.name for site in sites}
    reasons = dict(tied)
    for module in model.modules():
        getter: Callable[[], object] | None = getattr(module, "get_output_embeddings", None)
        head = _call(getter) if callable(getter) else None
        if isinstance(head, nn.Module) and head in by_module:
            reasons.setdefault(by_module[head], "output embeddings")
    if graph is not None:
        found = [dataflow.routers(graph, sites), dataflow.read_elsewhere(graph, sites)]
    else:
        found = [dataflow.routers_by_structure(model)]
    for some in found:
        for name, reason in some.items():
            reasons.setdefault(name, reason)
    return reasons


def _call(getter: Callable[[], object]) -> object:
    try:
        return getter()
    except (NotImplementedError, AttributeError):  # transformers' way of saying that a model has none
        return None


def _tied(model: nn.Module, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Linears whose weight is also a parameter of something that is no linear, such as the embeddings."""
    linear = {f"{alias}.weight" for site in sites for alias in site.aliases}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in linear:
            owners.setdefault(id(parameter), []).append(name)
    others = {site.name: owners.get(id(site.module._parameters.get("weight")), []) for site in sites}
    return {name: f"its weight is also {', '.join(found[:2])}" for name, found in others.items() if found}


def _obstacles(sites: Sequence[LinearSite]) -> dict[str, str]:
    """Linears that cannot be replaced, with the reason."""
    by_weight: dict[int, list[str]] = {}
    for site in sites:
        weight = site.module._parameters.get("weight")
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(site.name)
    reasons = {site.name: site.obstacle for site in sites if site.obstacle}
    for names in by_weight.values():
        for name in names if len(names) > 1 else ():
            other = names[0] if name != names[0] else names[1]
            reasons.setdefault(
                name,
                f"it shares its weight with {other}, and two copies of the planes would take more room than they save; "
                "to part them: module.weight = nn.Parameter(module.weight.clone())",
            )
    if "" in {site.name for site in sites}:
        reasons.setdefault("", "it is the model itself, which cannot be replaced in place; wrap it in nn.Sequential")
    return reasons


def _linear_entry(recipe: Recipe, site: LinearSite, one: _Decision, tied: bool) -> PlanEntry:
    weight = site.module._parameters.get("weight")
    dtype = str(weight.dtype).removeprefix("torch.") if weight is not None else "-"
    # The bytes of a tied weight are counted where it comes from, with the other parameters.
    before = weight.numel() * weight.element_size() if weight is not None and not tied else 0
    return PlanEntry(
        name=site.name,
        kind="linear",
        type=type(site.module).__name__,
        shape=(site.n, site.k),
        dtype=dtype,
        bytes_before=before,
        bytes_after=one.scheme.nbytes(site.n, site.k) if one.scheme else before,
        scheme=one.scheme,
        rule=one.rule,
        rule_text="" if one.rule is None else recipe.rules[one.rule].match,
        reason=one.reason,
        aliases=site.aliases,
        transposed=site.transposed,
        scale=one.scale,
    )


def _stacked_entry(recipe: Recipe, weight: StackedWeight, used: set[int], unread: Mapping[str, str]) -> PlanEntry:
    """A stack of matrices stays as it is; a rule that leaves it alone counts as used, one that spells it is refused."""
    reason = unread.get(weight.module_name, "a stack of matrices, and no experts as far as is known")
    for i, rule in enumerate(recipe.rules):
        inside = [n for n in (weight.name, weight.module_name) if rule.matches(n, nn.Module, math.prod(weight.shape))]
        if inside and rule.scheme is None:
            used.add(i)
        elif any(rule.spells(name) for name in inside):
            raise ModelError(
                f"rule {i + 1}, {rule.match!r}, names {weight.name} {list(weight.shape)}, which cannot be quantized: "
                f"{reason}\n  leave the rule out: the plan lists it as kept; or see fxquant.register_experts"
            )
    return PlanEntry(
        name=weight.name,
        kind="stacked",
        type="",
        shape=weight.shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        bytes_before=weight.nbytes,
        bytes_after=weight.nbytes,
        reason=reason,
    )


def _bare_entry(model: nn.Module, name: str, where: str) -> PlanEntry:
    parameter = model.get_parameter(name)
    size = parameter.numel() * parameter.element_size()
    return PlanEntry(
        name=name,
        kind="bare",
        type=type(model.get_submodule(name.rpartition(".")[0])).__name__,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        bytes_before=size,
        bytes_after=size,
        reason=f"no linear module owns it: {where}",
    )
