"""Rules and recipes: what they accept, decide, print and refuse."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant.errors import RecipeError, SchemeError
from fxquant.presets import PRESETS
from fxquant.recipe import Recipe
from fxquant.rule import Rule
from fxquant.scheme import Scheme
from fxquant.unused_rules import unmatched

INT4 = Scheme.parse("int4")

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(4)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head"]


class Conv1D(nn.Module):
    pass


class FancyLinear(nn.Linear):
    pass


def decision(recipe: Recipe, name: str, *, protected: bool = False) -> str | None:
    found = recipe.decide(name, nn.Linear, 1000, protected=protected)
    return found and found[1].target


# Rules


def test_a_rule_normalises_its_parts() -> None:
    rule = Rule("*", "INT4-g128", type=[nn.Linear, "Conv1D", "Linear"], min_size=1, scale="absmax")
    assert rule.scheme == INT4
    assert rule.type == ("Linear", "Conv1D")
    assert rule == Rule("*", INT4, type=("Linear", "Conv1D"), min_size=1, scale="absmax")
    assert len({rule, Rule("*", "int4", type=("Linear", "Conv1D"), min_size=1, scale="absmax")}) == 1
    assert Rule("*", None) == Rule("*", "keep") != Rule("*", "int4")
    assert dataclasses.replace(rule, match="a") == Rule(
        "a", "int4", type=("Linear", "Conv1D"), min_size=1, scale="absmax"
    )
    assert dataclasses.replace(Rule("a", None), optional=True) == Rule("a", None, optional=True)
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.match = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rule", "module_type", "size", "expected"),
    [
        (Rule("*", None), Conv1D, 0, True),
        (Rule("b", None), nn.Linear, 0, False),
        (Rule("*", None, type="Linear"), nn.Linear, 0, True),
        (Rule("*", None, type="Linear"), FancyLinear, 0, True),
        (Rule("*", None, type=FancyLinear), nn.Linear, 0, False),
        (Rule("*", None, type="Linear"), Conv1D, 0, False),
        (Rule("*", None, type=("Linear", "Conv1D")), Conv1D, 0, True),
        (Rule("*", None, min_size=10), nn.Linear, 9, False),
        (Rule("*", None, min_size=10), nn.Linear, 10, True),
        (Rule("*", None, max_size=10), nn.Linear, 10, True),
        (Rule("*", None, max_size=10), nn.Linear, 11, False),
        (Rule("*", None, min_size=0, max_size=0), nn.Linear, 0, True),
    ],
)
def test_rules_match_by_name_type_and_size(rule: Rule, module_type: type, size: int, expected: bool) -> None:
    assert rule.matches("a", module_type, size) is expected


def test_a_rule_prints_as_one_line_and_as_an_expression() -> None:
    rule = Rule("*.mlp.*", "int4-g64", type=("Linear", "Conv1D"), min_size=0, max_size=9, scale="absmax", optional=True)
    assert str(rule) == "*.mlp.* -> int4-g64 (type Linear or Conv1D, size >= 0, size <= 9, scale absmax, optional)"
    assert str(Rule("a", None)) == "a -> keep"
    assert repr(Rule("a", None)) == "Rule('a', None)"
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: Rule("", "int4"), "a pattern is empty"),
        (lambda: Rule("a{", "int4"), "unbalanced braces"),
        (lambda: Rule("re:(", "int4"), "is broken"),
        (lambda: Rule(3, "int4"), "a pattern in text, got 3"),  # type: ignore[arg-type]
        (lambda: Rule("*", "int4", type="torch.nn.Linear"), "a class or its bare name, got 'torch.nn.Linear'"),
        (lambda: Rule("*", "int4", type=7), "a class or its bare name, got 7"),
        (lambda: Rule("*", "int4", type=[]), "type names no class"),
        (lambda: Rule("*", "int4", min_size=-1), "min_size is a number of weights, a whole number from 0 on, got -1"),
        (lambda: Rule("*", "int4", max_size=1e6), "max_size is a number of weights.*got 1000000.0"),  # type: ignore[arg-type]
        (lambda: Rule("*", "int4", max_size=True), "got True"),
        (lambda: Rule("*", "int4", min_size=5, max_size=3), "fits no layer: min_size 5 is larger than max_size 3"),
        (lambda: Rule("*", "int4", scale="absmaks"), "by 'absmaks'; did you mean absmax"),
        (lambda: Rule("*", "int4", scale=3), "by 3\n  ways: absmax, minmax, least_squares"),  # type: ignore[arg-type]
        (lambda: Rule("*", "int4", optional="yes"), "optional is True or False, got 'yes'"),  # type: ignore[arg-type]
        (lambda: Recipe([]), "a recipe without rules does nothing"),
        (lambda: Recipe("int4"), "the rules of a recipe are a list, got 'int4'"),  # type: ignore[arg-type]
        (lambda: Recipe(3), "the rules of a recipe are a list, got 3"),  # type: ignore[arg-type]
        (lambda: Recipe(["int4"]), "rule 1 is 'int4'\n  a rule is"),  # type: ignore[list-item]
        (lambda: Recipe([("a", "int4", "b")]), "rule 1 is"),  # type: ignore[list-item]
        (lambda: Recipe([("a", "int4")], defaults=1), "defaults is True or False, got 1"),  # type: ignore[arg-type]
        (lambda: Recipe([("a", "int4")], misfit="shirnk"), "misfit cannot be 'shirnk'; did you mean shrink"),
        (lambda: Recipe([("a", "int4")], misfit="int44"), "misfit cannot be 'int44'.*\n.*did you mean int4"),
        (lambda: Recipe([("a", "int4")], misfit=None), 'misfit cannot be None; did you mean "keep"'),
        (lambda: Recipe([("a", "int4")], scale="least-squares"), "did you mean least_squares"),
        (lambda: Recipe([("a", "int4")], exclude=["b["]), "never closed"),
        (lambda: Recipe([("a", "int4")], exclude=3), "exclude is a list of patterns, got 3"),  # type: ignore[arg-type]
    ],
)
def test_bad_parts_are_refused(make: object, fact: str) -> None:
    with pytest.raises(RecipeError, match=fact):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["int44", "", 3, nn.Linear, object()])
def test_what_is_no_scheme_is_refused(scheme: object) -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme|a scheme cannot be"):
        Rule("*", scheme)


# Recipes


def test_the_first_rule_that_matches_decides() -> None:
    recipe = Recipe(
        [Rule("model.layers.{0,1}", "int8"), ("*.mlp.*", "int4-g64"), ("*.q_proj", None), ("*.up_proj", "fp8")]
    )
    assert decision(recipe, "model.layers.1.mlp.up_proj") == "int8"
    assert decision(recipe, "model.layers.2.mlp.up_proj") == "int4-g64"
    assert decision(recipe, "model.layers.3.self_attn.q_proj") == "keep"
    assert decision(recipe, "model.layers.3.self_attn.k_proj") is None
    assert recipe.decide("model.layers.2.mlp.up_proj", nn.Linear, 1) == (1, recipe.rules[1])


@settings(deadline=None)
@given(
    matches=st.lists(
        st.sampled_from(["*", "*.mlp.*", "*_proj", "model", "lm_head", "re:.*gate", "*.{up,down}_proj"]), min_size=1
    ),
    name=st.sampled_from(NAMES),
    protected=st.booleans(),
    defaults=st.booleans(),
    keep=st.booleans(),
)
def test_decide_is_the_first_of_the_rules_that_may(
    matches: list[str], name: str, protected: bool, defaults: bool, keep: bool
) -> None:
    recipe = Recipe([Rule(match, None if keep else "int8") for match in matches], defaults=defaults)
    may = [
        (i, rule)
        for i, rule in enumerate(recipe.rules)
        if rule.matches(name, nn.Linear, 1) and (rule.spells(name) or keep or not (protected and defaults))
    ]
    assert recipe.decide(name, nn.Linear, 1, protected=protected) == (may[0] if may else None)


def test_protected_modules_are_reached_by_rules_that_spell_them() -> None:
    assert decision(Recipe([("*", "int4")]), "lm_head") == "int4"
    assert decision(Recipe([("*", "int4")]), "lm_head", protected=True) is None
    assert decision(Recipe([("*", "int4"), ("lm_head", "int8")]), "lm_head", protected=True) == "int8"
    assert decision(Recipe([("*", "int4")], defaults=False), "lm_head", protected=True) == "int4"
    assert decision(Recipe([("*", None), ("lm_head", "int8")]), "lm_head", protected=True) == "keep"


def test_exclude_is_sugar_for_rules_in_front() -> None:
    recipe = Recipe([("*", "int4")], exclude=["lm_head", "*.q_proj"])
    assert recipe == Recipe([("lm_head", None), ("*.q_proj", None), ("*", "int4")])
    assert Recipe([("*", "int4")], exclude="lm_head") == Recipe([("lm_head", None), ("*", "int4")])
    assert dataclasses.replace(recipe, misfit="keep").rules == recipe.rules
    rest = Recipe([("*", "int4")], defaults=False, misfit="int8", scale="absmax")
    assert rest.excluding(["lm_head", "*.q_proj"]) == dataclasses.replace(rest, rules=recipe.rules)
    assert rest.excluding([]) == rest


def test_recipes_are_values() -> None:
    recipe = Recipe([("*", "int4")], misfit="int8-g64")
    assert recipe == Recipe([Rule("*", INT4)], misfit=Scheme.parse("int8-g64"))
    assert hash(recipe) == hash(Recipe([Rule("*", INT4)], misfit="int8-g64"))
    assert recipe != Recipe([("*", "int4")], misfit="int8")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert eval(repr(recipe)) == recipe
    assert repr(Recipe([("*", "int4")])) == "Recipe([Rule('*', 'int4')])"


def test_a_recipe_prints_its_rules_and_its_defaults() -> None:
    text = str(
        Recipe([Rule("*.mlp.*", "int4-g64", type="Linear")], misfit="shrink", scale="absmax", exclude=["lm_head"])
    )
    lines = text.splitlines()
    assert [line.split() for line in lines if line.strip()[:1].isdigit()] == [
        ["1", "lm_head", "keep"],
        ["2", "*.mlp.*", "int4-g64", "type", "Linear"],
    ]
    for fact in (
        "no rule reaches stay in full precision",
        "misfit=shrink",
        "by absmax",
        "  output embeddings, tied weights, routers",
    ):
        assert fact in text
    off = str(Recipe([("*", "int4")], defaults=False, misfit="int8"))
    assert "no defaults: wildcards reach protected modules too" in off
    assert "output embeddings" not in off
    assert "becomes int8 (misfit=int8)" in off


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("int4", Recipe([("*", "int4-g128")], misfit="shrink")),
        (" INT4 ", Recipe([("*", "int4-g128")], misfit="shrink")),
        ("int4-g128", Recipe([("*", "int4")])),
        ("uint4-g32", Recipe([("*", "uint4-g32")])),
        (INT4, Recipe([("*", "int4")])),
        (Rule("a", "int8"), Recipe([("a", "int8")])),
        ([("a", "int8"), Rule("*", None)], Recipe([("a", "int8"), ("*", None)])),
        ((("a", "int8"),), Recipe([("a", "int8")])),
    ],
)
def test_what_stands_for_a_recipe(what: object, expected: Recipe) -> None:
    assert Recipe.resolve(what) == expected
    assert Recipe.resolve(expected) is expected


@pytest.mark.parametrize(
    ("what", "error", "fact"),
    [
        ("int44", RecipeError, "no preset and no scheme is called 'int44'; did you mean int4"),
        ("smal", RecipeError, "did you mean small"),
        ("int4-g12x", SchemeError, "'g12x' is not understood"),
        ("", RecipeError, "no preset and no scheme is called ''"),
        ("recipe.json", RecipeError, "a .yaml file; or rules"),
        (None, RecipeError, "a recipe cannot be None"),
        (3, RecipeError, "a recipe cannot be 3"),
        (nn.Linear, SchemeError, "a scheme cannot be the class Linear"),
        (("*", "int8"), RecipeError, r"rule 1 is '\*'"),
        ([], RecipeError, "without rules"),
    ],
)
def test_what_stands_for_no_recipe(what: object, error: type[Exception], fact: str) -> None:
    with pytest.raises(error, match=fact):
        Recipe.resolve(what)


def test_a_path_stands_for_the_recipe_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    Recipe.preset("small").to_file(path)
    assert Recipe.resolve(str(path)) == Recipe.resolve(path) == Recipe.preset("small")


def test_presets_are_recipes_with_one_line_each() -> None:
    assert set(PRESETS) == {"int8", "int4", "nf4", "nf4-dq", "fp4", "fp8", "small"}
    for name, preset in PRESETS.items():
        assert "\n" not in preset.description
        assert Recipe.preset(name) == Recipe.resolve(name) == Recipe(preset.rules, misfit=preset.misfit)
        assert decision(Recipe.preset(name), "model.layers.0.mlp.up_proj") == ("int4" if name == "small" else name)
        reaches_head = decision(Recipe.preset(name), "lm_head", protected=True)
        assert reaches_head == ("int8" if name == "small" else None)
    small = Recipe.preset("small")
    assert [decision(small, n, protected=True) for n in ("text.lm_head", "embed_out", "mlp.gate")] == [
        "int8",
        "int8",
        None,
    ]
    assert unmatched(small, {1}, ["a"]) is None
    with pytest.raises(RecipeError, match="no preset is called 'smal'; did you mean small"):
        Recipe.preset("smal")
