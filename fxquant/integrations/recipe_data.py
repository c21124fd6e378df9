"""Recipes as plain data, for configs that are written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.errors import RecipeError
from fxquant.presets import PRESETS
from fxquant.recipe import Recipe
from fxquant.rule import Rule

_PARTS = ("rules", "defaults", "misfit", "scale")
_RULE_PARTS = ("match", "scheme", "type", "min_size", "max_size", "scale", "optional")


def recipe_data(recipe: Any) -> str | dict[str, Any]:
    """A recipe as JSON can hold it: the name of a preset, or its rules and settings.

    Args:
        recipe: anything that stands for a recipe, or what this function made of one.

    Raises:
        RecipeError: it stands for none.
        SchemeError: a scheme in it does not exist.
        FileError: it is a path that cannot be read.
    """
    if isinstance(recipe, str) and recipe.strip().lower() in PRESETS:
        return recipe.strip().lower()
    found = recipe_from(recipe)
    rules = [{"match": rule.match, "scheme": rule.target, **rule.options} for rule in found.rules]
    rules = [{key: list(v) if isinstance(v, tuple) else v for key, v in rule.items()} for rule in rules]
    return {"rules": rules, "defaults": found.defaults, "misfit": str(found.misfit), "scale": found.scale}


def recipe_from(data: Any) -> Recipe:
    """The recipe that `recipe_data` was made from; anything else that stands for a recipe, too.

    Raises:
        RecipeError: it stands for none.
        SchemeError: a scheme in it does not exist.
        FileError: it is a path that cannot be read.
    """
    if not isinstance(data, Mapping):
        return Recipe.resolve(data)
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(_is_rule(rule) for rule in rules) or not set(data) <= set(_PARTS):
        raise RecipeError(
            f"this is no recipe: {str(dict(data))[:200]}\n"
            f"  as data it has the keys {', '.join(_PARTS)}; each rule has {', '.join(_RULE_PARTS)}"
        )
    settings = {key: data[key] for key in _PARTS[1:] if key in data}
    return Recipe([Rule(**rule) for rule in rules], **settings)


def _is_rule(rule: Any) -> bool:
    return isinstance(rule, Mapping) and {"match", "scheme"} <= set(rule) <= set(_RULE_PARTS)
