"""Patterns against an independent reading of them: brace expansion by hand, fnmatch for the rest."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxquant.errors import RecipeError
from fxquant.name_match import compile_name_pattern, has_wildcard


def expand(glob: str) -> list[str]:
    """All globs without braces that a glob with braces stands for."""
    if "{" not in glob:
        return [glob]
    start, depth, cuts = glob.index("{"), 0, []
    for end in range(start, len(glob)):
        depth += {"{": 1, "}": -1}.get(glob[end], 0)
        if glob[end] in "{," and depth == 1:
            cuts.append(end)
        if depth == 0:
            break
    items = [glob[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], end], strict=True)]
    plain = []
    for item in items:
        if found := re.fullmatch(r"(\d+)\.\.(\d+)", item):
            low, high = sorted(map(int, found.groups()))
            plain += [str(number) for number in range(low, high + 1)]
        else:
            plain.append(item)
    return [whole for item in plain for whole in expand(glob[:start] + item + glob[end + 1 :])]


def reaches(glob: str, name: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, plain) or (not has_wildcard(glob) and name.startswith(plain + "."))
        for plain in expand(glob)
    )


def spelled(glob: str, name: str, at: int = 0) -> bool:
    """Whether a brace-free glob matches `name[at:]` with no wildcard taking, or standing in, a bit of the last part."""
    leaf = name.rfind(".") + 1
    if not glob:
        return at == len(name)
    if glob[0] == "*":
        return any(spelled(glob[1:], name, end) for end in range(at, leaf + 1))
    width = glob.index("]", 2) + 1 if glob[0] == "[" else 1
    if at == len(name) or not fnmatch.fnmatchcase(name[at], glob[:width]):
        return False
    return ((width == 1 and glob[0] != "?") or at < leaf) and spelled(glob[width:], name, at + 1)


words = st.sampled_from(["a", "b", "ab", "x_y", "0", "1", "12", ".", ".a", "b.", "lm_head"])
wildcards = st.sampled_from(["*", "?", "[ab]", "[!a]", "[0-9]", "**", "[]a]", "[a-]"])
ranges = st.sampled_from(["0..2", "2..0", "1..1", "11..13", "9..10"])


def joined(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(part, min_size=1, max_size=3).map("".join)


def braces(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.lists(inner | ranges | st.just(""), min_size=1, max_size=3).map(
        lambda items: "{" + ",".join(items) + "}"
    )
    return joined(group | words)


globs = joined(st.recursive(words | wildcards, braces, max_leaves=3)).filter(lambda g: g.count("{") < 5)
names = joined(words).filter(lambda n: ".." not in n)


@settings(deadline=None, max_examples=500)
@given(glob=globs, name=names)
@example(glob="model.layers.{3..0}.*", name="model.layers.2.mlp")
@example(glob="{a,b{c,d}}e", name="bde")
@example(glob="a{,b}", name="a")
def test_globs_match_what_their_expansions_match(glob: str, name: str) -> None:
    try:
        pattern = compile_name_pattern(glob)
    except RecipeError:
        # The only fault that these can have: a range-like run of dots outside of braces.
        assert ".." in glob
        return
    assert pattern.matches(name) == reaches(glob, name)


@settings(deadline=None, max_examples=500)
@given(glob=globs, name=names)
@example(glob="*lm_head", name="model.lm_head")
@example(glob="*{ab,lm_head}", name="lm_head")
def test_globs_spell_a_name_whose_last_part_no_wildcard_takes(glob: str, name: str) -> None:
    try:
        pattern = compile_name_pattern(glob)
    except RecipeError:
        assert ".." in glob
        return
    assert pattern.spells(name) == any(spelled(plain, name) for plain in expand(glob))


@settings(deadline=None)
@given(name=st.text(min_size=1).filter(str.strip))
def test_a_star_matches_everything_and_spells_nothing(name: str) -> None:
    assert compile_name_pattern("*").matches(name)
    if not name.endswith("."):
        assert not compile_name_pattern("*").spells(name)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("model.layers.0", ["model.layers.0", "model.layers.0.mlp.up"], ["model.layers.01", "xmodel.layers.0"]),
        ("model.layers.{0,2..4}", ["model.layers.3", "model.layers.0.a"], ["model.layers.1", "model.layers.5"]),
        ("*.mlp", ["a.mlp", "a.b.mlp"], ["mlp", "a.mlp.up"]),
        ("layers.[0-3].*", ["layers.2.a"], ["layers.12.a", "layers.2"]),
        ("layers.[^0].*", ["layers.2.a"], ["layers.0.a"]),
        ("layers.?.a", ["layers.7.a"], ["layers.17.a"]),
        ("layers.?", ["layers.7"], ["layers.7.a"]),
        ("layers.[0-3]", ["layers.2"], ["layers.2.a"]),
        ("a*b", ["a\nb", "ab"], ["a\nb\n"]),
        ("a,b", ["a,b"], ["a", "b"]),
        ("a.b+(c)", ["a.b+(c)"], ["aXb+(c)", "a.bb"]),
        ("re:.*\\.(q|k)_proj", ["a.q_proj", "a.b.k_proj"], ["q_proj", "a.q_proj.x", "a.v_proj"]),
        ("re:lm_head", ["lm_head"], ["lm_head.x", "x.lm_head"]),
        ("*", ["", "a", "a.b"], []),
    ],
)
def test_what_patterns_reach(pattern: str, yes: list[str], no: list[str]) -> None:
    compiled = compile_name_pattern(pattern)
    assert [name for name in yes if not compiled.matches(name)] == []
    assert [name for name in no if compiled.matches(name)] == []


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "lm_head.decoder", False),
        ("*lm_head", "model.lm_head", True),
        ("*.{lm_head,score}", "model.score", True),
        ("model.*_attn.router", "model.self_attn.router", True),
        ("model.layers.[0-9].gate", "model.layers.3.gate", True),
        ("*", "lm_head", False),
        ("*_head", "lm_head", False),
        ("*gate*", "mlp.gate", False),
        ("lm_hea?", "lm_head", False),
        ("lm_hea[d]", "lm_head", False),
        ("model", "model.lm_head", False),
        ("lm_head", "score", False),
        ("*", "", False),
        ("re:lm_head", "lm_head", True),
        ("re:.*lm_head", "model.lm_head", True),
        ("re:(.*\\.)?(lm_head|score)", "score", True),
        ("re:.*\\.(q|k|v)_proj", "a.v_proj", True),
        ("re:.*\\.experts\\.[0-9]\\.gate", "a.experts.1.gate", True),
        ("re:(?i).*LM_HEAD", "lm_head", True),
        ("re:.*", "lm_head", False),
        ("re:.*head", "lm_head", False),
        ("re:.*gate.*", "mlp.gate", False),
        ("re:[a-z_]+", "lm_head", False),
        ("re:\\w+", "lm_head", False),
        ("re:.{7}", "lm_head", False),
        ("re:.*experts\\.\\d+", "a.experts.17", False),
        ("re:lm_\\w*head", "lm_head", False),
        ("re:.*\\.q_proj\\d*", "a.q_proj", False),
        ("re:model(\\..*)?", "model.lm_head", False),
    ],
)
def test_what_patterns_spell(pattern: str, name: str, expected: bool) -> None:
    assert compile_name_pattern(pattern).spells(name) is expected


@pytest.mark.parametrize(
    ("pattern", "fact"),
    [
        ("", "a pattern is empty"),
        ("  ", "a pattern is empty"),
        ("re:", "a pattern is empty"),
        ("a{b", r"unbalanced braces in \"a\{b\": a \{ is never closed"),
        ("a}b", r"a \} closes nothing"),
        ("{a}}", r"a \} closes nothing"),
        ("{a,{b,c}", "is never closed"),
        ("a[b", r"a \[ is never closed"),
        ("a[z-a]", "is broken: bad character range z-a"),
        ("layers.{a..c}", r"not a range: \"a\.\.c\""),
        ("layers.{0..}", "not a range"),
        ("layers.{..3}", "not a range"),
        ("layers.{0..3..2}", "not a range"),
        ("layers.0..3", "a range stands in braces"),
        ("layers.{0..99999999}", "too long: 10,000 numbers are the most"),
        ("re:a(", "is broken: missing \\), unterminated subpattern"),
        ("re:*a", "is broken: nothing to repeat"),
        ("{" * 5000 + "a" + "}" * 5000, "is broken"),
    ],
)
def test_broken_patterns_say_what_is_wrong(pattern: str, fact: str) -> None:
    with pytest.raises(RecipeError, match=fact):
        compile_name_pattern(pattern)
