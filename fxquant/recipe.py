"""An ordered list of rules: which modules get which scheme. The first rule that matches decides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxquant.codecs import ScaleSearch
from fxquant.errors import RecipeError, nearest
from fxquant.misfits import MISFITS, check_misfit, fit
from fxquant.presets import PRESETS
from fxquant.recipe_yaml import read_recipe, write_recipe
from fxquant.rule import Rule, check_scale
from fxquant.scheme import ELEMENTS, NAMES, Scheme
from fxquant.tables import Table
from fxquant.torchao_configs import is_torchao_config

DEFAULTS = (
    "protected modules are reached only by a rule that spells their last name part, as lm_head or *.lm_head do:",
    "  output embeddings, tied weights, routers, modules whose weight other code reads",
)
"""What holds unless a recipe says `defaults=False`, for people."""


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """Rules, of which the first that matches decides; `print(recipe)` shows them, and the defaults in force."""

    rules: tuple[Rule, ...]
    """Rules made of `exclude` stand in front."""
    defaults: bool
    misfit: str | Scheme
    """A key of `MISFITS`, or the scheme that takes the place of one that does not fit."""
    scale: ScaleSearch
    """How scales are chosen where a rule does not say."""

    def __init__(
        self,
        rules: Iterable[Rule | tuple[str, object]],
        *,
        defaults: bool = True,
        misfit: object = "error",
        scale: str = "least_squares",
        exclude: str | Iterable[str] = (),
    ) -> None:
        """Check and normalise the parts of a recipe.

        Args:
            rules: rules, or pairs of a pattern and what stands for a scheme.
            defaults: protected modules are reached only by a rule that spells their last name part.
            misfit: what becomes of a layer that cannot hold its scheme: "error", "keep" (full precision), "shrink"
                (the largest power-of-two group from 16 on that divides K, else int8), or another scheme.
            scale: how scales are chosen where a rule does not say, see `Rule`.
            exclude: patterns of modules to leave in full precision: rules with None in front of all others.

        Raises:
            RecipeError: a part that cannot be understood, or no rules at all.
            SchemeError: a scheme that does not exist.
        """
        patterns = (exclude,) if isinstance(exclude, str) else exclude
        if not isinstance(patterns, Iterable):
            raise RecipeError(f"exclude is a list of patterns, got {exclude!r}")
        normal = (*(Rule(pattern, None) for pattern in patterns), *_rules(rules))
        if not normal:
            raise RecipeError(
                'a recipe without rules does nothing\n  e.g. Recipe([("lm_head", "int8"), ("*", "int4")])'
            )
        if not isinstance(defaults, bool):
            raise RecipeError(f"defaults is True or False, got {defaults!r}")
        object.__setattr__(self, "rules", normal)
        object.__setattr__(self, "defaults", defaults)
        object.__setattr__(self, "misfit", check_misfit(misfit))
        object.__setattr__(self, "scale", check_scale(scale))

    def excluding(self, patterns: str | Iterable[str]) -> Recipe:
        """This recipe with rules in front that leave what `patterns` match as it is."""
        return Recipe(self.rules, defaults=self.defaults, misfit=self.misfit, scale=self.scale, exclude=patterns)

    def decide(self, name: str, module_type: type, size: int, *, protected: bool = False) -> tuple[int, Rule] | None:
        """The first rule that reaches a module, and its index; None where no rule does.

        Args:
            name: the module's dotted name.
            module_type: its class.
            size: the number of its weights, N * K.
            protected: it is one of those that `defaults` protect. A rule that leaves modules as they are may still
                reach it by a wildcard: that is what happens anyway.
        """
        guarded = protected and self.defaults
        for index, rule in enumerate(self.rules):
            if guarded and rule.scheme is not None and not rule.spells(name):
                continue
            if rule.matches(name, module_type, size):
                return index, rule
        return None

    def fit(self, name: str, scheme: Scheme, n: int, k: int) -> tuple[Scheme | None, str]:
        """What an `[n, k]` layer gets in place of `scheme`, and why; the scheme itself and "" where it fits.

        Raises:
            SchemeError: it does not fit, and `misfit` calls this an error or names a scheme that fits no better.
        """
        return fit(name, scheme, n, k, self.misfit)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """The recipe of this name in `PRESETS`.

        Raises:
            RecipeError: there is none; names the nearest.
        """
        if name not in PRESETS:
            raise RecipeError(f"no preset is called {name!r}{nearest(name, PRESETS)}\n  presets: {', '.join(PRESETS)}")
        preset = PRESETS[name]
        return cls(preset.rules, misfit=preset.misfit)

    @classmethod
    def resolve(cls, what: object) -> Recipe:
        """A recipe out of anything that stands for one.

        Args:
            what: a recipe; a preset's name; a path that ends in .yaml or .yml; a scheme, its spelling or a torchao
                config (everything becomes that, and what cannot hold it is an error); a rule; or a sequence of rules.

        Raises:
            RecipeError: it stands for none; names the nearest presets and schemes.
            SchemeError: it is a scheme's spelling with a fault in it.
            FileError: it is a path that cannot be read.
        """
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Rule):
            return cls([what])
        if isinstance(what, (str, os.PathLike)):
            return cls._of_text(os.fspath(what), is_path=not isinstance(what, str))
        if isinstance(what, Sequence):
            return cls(what)
        if isinstance(what, (Scheme, type)) or is_torchao_config(what):
            return cls([Rule("*", what)])
        raise RecipeError(f"a recipe cannot be {what!r}\n  {_CHOICES}")

    @classmethod
    def _of_text(cls, text: str, *, is_path: bool) -> Recipe:
        word = text.strip().lower()
        if is_path or word.endswith((".yaml", ".yml")):
            return cls.from_file(text)
        if word in PRESETS:
            return cls.preset(word)
        if re.split(r"[-+(]", word)[0] in (*ELEMENTS, "table") or word.partition("+")[0] in NAMES:
            return cls([Rule("*", Scheme.parse(text))])
        raise RecipeError(
            f"no preset and no scheme is called {text!r}{nearest(word, [*PRESETS, *ELEMENTS, *NAMES])}\n  {_CHOICES}"
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file; see `fxquant.recipe_yaml` for its keys.

        Raises:
            FileError: the file cannot be read, is not text, or is longer than a recipe can be.
            RecipeError: names file, line, what stood there and the nearest known word.
            SchemeError: likewise, for a scheme that does not exist.
        """
        return cls(**read_recipe(path))

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML; a file that is there already is replaced as a whole or not at all.

        Raises:
            FileError: the file cannot be written.
        """
        write_recipe(path, self.rules, defaults=self.defaults, misfit=str(self.misfit), scale=self.scale)

    def table(self) -> Table:
        """The rules as a table, and below it what else the recipe says."""
        misfit = str(self.misfit)
        rows = ((str(i), r.match, r.target, r.details) for i, r in enumerate(self.rules, 1))
        return Table(
            title="recipe",
            columns=("rule", "modules", "become", "with"),
            rows=tuple(rows),
            right=frozenset({0}),
            notes=(
                "the first rule that matches decides; modules that no rule reaches stay in full precision",
                f"a layer that cannot hold its scheme {MISFITS.get(misfit, f'becomes {misfit}')} (misfit={misfit})",
                f"scales are chosen by {self.scale}",
                *(DEFAULTS if self.defaults else ("no defaults: wildcards reach protected modules too",)),
            ),
        )

    def __str__(self) -> str:
        """The table as text."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def __repr__(self) -> str:
        """An expression that makes this recipe."""
        options = {"defaults": (self.defaults, True), "misfit": (str(self.misfit), "error")}
        options["scale"] = (self.scale, "least_squares")
        texts = [f"{name}={value!r}" for name, (value, usual) in options.items() if value != usual]
        return f"Recipe({', '.join([repr(list(self.rules)), *texts])})"


_CHOICES = (
    f"presets: {', '.join(PRESETS)}; schemes such as int4-g64-asym, int8-g128, nf4-dq; "
    "a .yaml file; or rules: [(pattern, scheme), ...]"
)


def _rules(rules: object) -> Iterable[Rule]:
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise RecipeError(f"the rules of a recipe are a list, got {rules!r}\n  e.g. Recipe([Rule('*', 'int4')])")
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, Rule):
            yield rule
        elif isinstance(rule, (tuple, list)) and len(rule) == 2:
            yield Rule(*rule)
        else:
            raise RecipeError(
                f"rule {number} is {rule!r}\n  a rule is Rule(pattern, scheme) or a pair (pattern, scheme)"
            )
