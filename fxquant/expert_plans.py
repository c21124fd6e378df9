"""The recipe applied to experts: every matrix of every expert is decided like a linear of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxquant.codecs import ScaleSearch, check_search
from fxquant.errors import FxquantError, ModelError, RecipeError, SchemeError
from fxquant.experts import ExpertSite, Projection, expert_name, expert_weight
from fxquant.plans import PlanEntry
from fxquant.recipe import Recipe
from fxquant.scheme import Scheme

_UNMATCHED = "no rule matches"


@dataclass(frozen=True)
class ExpertPlan:
    """What becomes of all experts of a model."""

    entries: tuple[PlanEntry, ...]
    errors: tuple[FxquantError, ...]
    """Why the recipe cannot be followed; the plan is refused."""
    used: frozenset[int]
    """Rules that decide something."""


def plan_experts(recipe: Recipe, sites: Sequence[ExpertSite]) -> ExpertPlan:
    """Decide for every matrix of every expert.

    A rule reaches a matrix by its own name (`...experts.17.down_proj`), by that of the parameter that holds it
    (`...experts.down_proj`) and by that of the module (`...experts`). The first rule that reaches it decides.

    Args:
        recipe: the rules.
        sites: the experts modules of a model.
    """
    obstacles = _shared(sites) | _alone(sites)
    entries: list[PlanEntry] = []
    errors: list[FxquantError] = []
    for site in sites:
        found: list[PlanEntry] = []
        for name, e, projection in site.linears():
            try:
                found.append(_decide(recipe, site, name, e, projection, obstacles.get(site.name)))
            except FxquantError as error:
                errors.append(error)
        entries += found
        errors += _half_covered(site, found)
    return ExpertPlan(tuple(entries), tuple(errors), frozenset(e.rule for e in entries if e.rule is not None))


def _decide(
    recipe: Recipe, site: ExpertSite, name: str, e: int, projection: Projection, obstacle: str | None
) -> PlanEntry:
    weight = expert_weight(site.module, site.layout, projection.name, e)
    n, k = weight.shape
    nbytes = weight.numel() * weight.element_size()
    names = [
        one
        for alias in site.aliases
        for one in (expert_name(alias, e, projection.name), f"{alias}.{projection.parameter}".lstrip("."), alias)
    ]
    reached = [r for r in (recipe.decide(x, type(site.module), n * k, protected=False) for x in names) if r]
    index, rule = min(reached, key=lambda r: r[0], default=(None, None))
    scheme, reason = None, _UNMATCHED
    if rule is not None and rule.scheme is None:
        reason = "the rule keeps it"
    elif rule is not None and obstacle:
        if not site.name or any(rule.spells(one) for one in names):
            raise ModelError(f"{site.name or 'the model'} cannot be quantized: {obstacle}")
        reason = obstacle
    elif rule is not None:
        assert rule.scheme is not None
        scheme, reason = recipe.fit(name, rule.scheme, n, k)
        _check(name, scheme, rule.scale or recipe.scale)
    return PlanEntry(
        name=name,
        kind="expert",
        type=type(site.module).__name__,
        shape=(n, k),
        dtype=str(weight.dtype).removeprefix("torch."),
        bytes_before=nbytes,
        bytes_after=scheme.nbytes(n, k) if scheme else nbytes,
        scheme=scheme,
        rule=index,
        rule_text="" if rule is None else rule.match,
        reason=reason,
        transposed=projection.transposed,
        scale=(rule.scale if rule else None) or recipe.scale,
    )


def _check(name: str, scheme: Scheme | None, scale: ScaleSearch) -> None:
    if scheme is None:
        return
    check_search(scheme, scale)
    if scheme.activation and scheme.activation.static:
        raise SchemeError(
            f"{name} cannot be {scheme}: stacked experts have no module of their own whose input could be measured\n"
            "  leave -static out, or make linears of them before quantizing: see fxquant.sequential_experts"
        )


def _half_covered(site: ExpertSite, entries: Sequence[PlanEntry]) -> Iterator[RecipeError]:
    """A stack of which rules reach a part: what is left over was hardly meant."""
    left = [e for e in entries if e.rule is None]
    if left and len(left) < len(entries):
        yield RecipeError(
            f"rules reach {len(entries) - len(left)} of {len(entries)} matrices of the experts in {site.name}, "
            f"{left[0].name} not\n"
            f'  quantize the rest too, or say that it stays: Rule("{site.name}.*", None) behind the other rules'
        )


def _shared(sites: Sequence[ExpertSite]) -> dict[str, str]:
    """Experts modules that hold a parameter which another one holds too, with the reason."""
    owners: dict[int, list[str]] = {}
    for site in sites:
        for parameter in dict.fromkeys(p.parameter for p in site.layout.projections):
            owners.setdefault(id(site.module.get_parameter(parameter)), []).append(site.name)
    return {
        name: f"it shares its weights with {', '.join(other for other in names if other != name)}"
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def _alone(sites: Sequence[ExpertSite]) -> dict[str, str]:
    reason = "it is the model itself, which cannot be replaced in place; wrap it in nn.Sequential"
    return {site.name: reason for site in sites if not site.name}


def matrices(sites: Sequence[ExpertSite]) -> set[str]:
    """Names of the parameters that hold the experts of these modules."""
    return {
        f"{alias}.{p.parameter}".lstrip(".")
        for site in sites
        for alias in site.aliases
        for p in site.layout.projections
    }
