"""Rules that decided nothing: the error says why, and a pattern that it suggests does reach something."""

from __future__ import annotations

import pytest
from torch import nn

from fxquant.errors import RecipeError
from fxquant.recipe import Recipe
from fxquant.rule import Rule
from fxquant.unused_rules import collapse, places, unmatched

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(4)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head"]


@pytest.mark.parametrize(
    ("match", "likely"),
    [
        ("*.q_porj", '"*.q_proj"'),
        ("re:.*\\.q_porj", '"re:.*\\.q_proj"'),
        ("lm_heda", '"lm_head"'),
        ("lm_head.weight", '"lm_head"'),
        ("model.layers.0.", '"model.layers.0"'),
        ("layers.0", '"*.layers.0.*"'),
        ("self_attn", '"*.self_attn.*"'),
        ("re:q_proj", '"re:.*q_proj"'),
        ("*.mlp", '"*.mlp.*"'),
        ("model.layers.{7..9}.mlp.up_proj", '"model.layers.*.mlp.up_proj"'),
        ("model.layers.9", '"model.layers.*"'),
        ("down", '"*down*"'),
    ],
)
def test_a_slip_is_named_with_a_pattern_that_reaches_something(match: str, likely: str) -> None:
    error = unmatched(Recipe([("*.up_proj", "int8"), (match, "int4")]), {0}, NAMES)
    assert isinstance(error, RecipeError)
    assert str(error).splitlines()[0] == f'rule 2 matched nothing: "{match}"; did you mean {likely}?'
    assert any(Rule(likely.strip('"'), None).matches(name, nn.Linear, 1) for name in NAMES)


def test_a_pattern_like_nothing_still_says_where_linears_live() -> None:
    error = unmatched(Recipe([("blocks.*.mlp", "int8")]), set(), NAMES)
    assert str(error).splitlines() == [
        'rule 1 matched nothing: "blocks.*.mlp"',
        "  linears in this model live under: model.layers.*.self_attn, model.layers.*.mlp, lm_head",
        "  a rule that may match nothing says so: Rule(..., optional=True)",
    ]


def test_names_that_look_alike_are_named() -> None:
    error = unmatched(Recipe([("mode.layer?.*.mlpp.gaet", "int8")]), set(), NAMES)
    assert "did you mean model.layers.*.mlp.gate, " in str(error)


@pytest.mark.parametrize(
    ("rules", "used", "facts"),
    [
        ([("*", "int8"), ("*.gate", "int4")], {0}, ["rule 2 decides nothing", 'these stand before it: rule 1 ("*")']),
        ([Rule("*.gate", "int4", type="Foo", min_size=3)], set(), ["the rule also asks for type Foo, size >= 3"]),
        ([("*head", "int4")], set(), ['"*head" fits lm_head', 'spells its last name part: "*.lm_head"']),
        ([("x", "int4"), ("*.y", "int8")], set(), ['rule 1 matched nothing: "x"', 'rule 2 matched nothing: "*.y"']),
    ],
)
def test_a_rule_that_fits_a_name_but_decides_nothing_says_why(
    rules: list[Rule], used: set[int], facts: list[str]
) -> None:
    error = str(unmatched(Recipe(rules), used, NAMES))
    assert [fact for fact in facts if fact not in error] == []


def test_rules_that_decided_or_are_optional_are_no_error() -> None:
    recipe = Recipe([Rule("nothing", None, optional=True), ("*", "int4")])
    assert unmatched(recipe, {1}, NAMES) is None
    assert unmatched(recipe, set(), []) is not None
    assert "nowhere, there are none" in str(unmatched(recipe, set(), []))


def test_places() -> None:
    assert places(["a.0.b", "a.1.c", "a.1.d.0", "lm_head", "0"]) == "a.*, a.*.d, lm_head, 0"
    assert places([f"part{i}.x" for i in range(11)]).endswith(", part7 and 3 more")
    assert places([""]) == "the model itself"
    assert collapse("a.0.b1.17") == "a.*.b1.*"
