"""Recipes as files: what is written is read back, and what cannot be read is named by file, line and nearest word."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxquant.codecs import SCALE_SEARCHES
from fxquant.errors import FileError, FxquantError, RecipeError, SchemeError
from fxquant.recipe import Recipe
from fxquant.recipe_yaml import LONGEST_FILE
from fxquant.rule import Rule

spellings = st.sampled_from(["int8", "int4-g64-asym", "nf4-dq", "fp8-tensor", "uint4-g32", "int8-b2x3-fp16", None])
SIZES = st.none() | st.integers(0, 2**63 - 1)
plain_text = st.text(st.characters(exclude_characters="*?[]{}"), min_size=1)
regexes = st.sampled_from(["re:.*\\.(q|k)_proj", "re:\\w+", "re:a: b # c", "re:'\"", "re:\n"])
words = st.sampled_from(
    [
        "*",
        "{a,b}",
        "[!a]",
        "null",
        "~",
        "true",
        "0",
        "1e3",
        "- a",
        "<<",
        "=",
        "!x",
        "&x",
        "#",
        ": ",
        "keep",
        "match",
        "rules",
        "\t",
    ]
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    match = draw(
        (plain_text | words | regexes).filter(lambda text: text.strip() and ".." not in text and text != "re:")
    )
    low, high = draw(SIZES), draw(SIZES)
    if low is not None and high is not None:
        low, high = sorted((low, high))
    options = {
        "type": draw(st.sampled_from([None, "Linear", ("Linear", "Conv1D"), "null"])),
        "min_size": low,
        "max_size": high,
    }
    try:
        return Rule(
            match,
            draw(spellings),
            scale=draw(st.sampled_from([None, *SCALE_SEARCHES])),
            optional=draw(st.booleans()),
            **draw(st.sampled_from([{}, options])),
        )
    except RecipeError:
        assert match.startswith("re:"), match
        return Rule("*", None)


recipes = st.builds(
    Recipe,
    st.lists(rules(), min_size=1, max_size=4),
    defaults=st.booleans(),
    misfit=st.sampled_from(["error", "keep", "shrink", "int8", "int4-g32"]),
    scale=st.sampled_from(SCALE_SEARCHES),
    exclude=st.lists(words, max_size=2).filter(lambda w: all(map(str.strip, w))),
)


@settings(deadline=None, max_examples=300)
@given(recipe=recipes)
@example(
    recipe=Recipe(
        [Rule("match", None), Rule("a" * 300, "int8"), Rule("x\u2028y\x85z\ud800\x00", None), Rule("0\x85", None)]
    )
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.to_file(path)
    assert Recipe.from_file(path) == recipe
    assert Recipe.from_file(str(path)) == recipe
    # Another reader sees plain data, in which nothing needs a tag.
    assert set(yaml.safe_load(path.read_text("utf-8"))) == {"rules", "defaults", "misfit", "scale"}


def read(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Recipe.from_file(path)


def test_a_file_as_a_person_writes_it(tmp_path: Path) -> None:
    text = """\
# comments are fine
exclude: ["*.q_proj"]
rules:
  - lm_head: int8
  - model.layers.{0,1}.*: nf4
  - 0: keep
  - match: "*.mlp.*"
    scheme: int4-g64
    type: [Linear, Conv1D]
    min_size: 1_000
    max_size: 2000
    scale: absmax
    optional: yes
  - {match: a, scheme: null, type: Linear}
  - b: ~
  - "*": int4
misfit: shrink
scale: absmax
defaults: off
"""
    assert read(tmp_path, text) == Recipe(
        [
            ("lm_head", "int8"),
            ("model.layers.{0,1}.*", "nf4"),
            ("0", None),
            Rule(
                "*.mlp.*",
                "int4-g64",
                type=("Linear", "Conv1D"),
                min_size=1000,
                max_size=2000,
                scale="absmax",
                optional=True,
            ),
            Rule("a", None, type="Linear"),
            ("b", None),
            ("*", "int4"),
        ],
        exclude=["*.q_proj"],
        misfit="shrink",
        scale="absmax",
        defaults=False,
    )
    assert read(tmp_path, "\ufeffrules: [a: int8]\nexclude: b") == Recipe([("a", "int8")], exclude=["b"])
    assert read(tmp_path, "rules: []\nexclude: b") == Recipe([("b", None)])
    assert read(tmp_path, "rules: [&x {a: int8}, *x]") == Recipe([("a", "int8"), ("a", "int8")])


RULE = "rules:\n- match: a\n  scheme: int8\n"


@pytest.mark.parametrize(
    ("text", "line", "fact"),
    [
        ("", 1, "the file is empty: a recipe needs rules"),
        ("# nothing\n", 1, "the file is empty"),
        ("misfit: keep\n", 1, "a recipe needs the key rules; the keys here are misfit"),
        ("rules:\n", 1, 'rules is a list of items such as - "*": int4, not nothing'),
        ("rules: []\n", 1, "the recipe has no rules"),
        ("rules: {a: int8}\n", 1, "rules is a list of items"),
        ("rules: int8\n", 1, "rules is a list of items such as - \"*\": int4, not 'int8'"),
        ("- a: int8\n", 1, "a recipe is a mapping with the keys rules, exclude, misfit, scale, defaults, not a list"),
        ("ruels:\n- a: int8\n", 1, "a recipe has no key 'ruels'; did you mean rules?"),
        ("rules:\n- a\n", 2, "a rule is a pattern and a scheme, such as 'a': int4; here is no scheme"),
        ("rules:\n- [a, int8]\n", 2, "a rule is a mapping with the keys match, scheme"),
        ("rules:\n- a: int8\n  b: int8\n", 3, "a second rule in one item"),
        ("rules:\n- {}\n", 2, "a rule needs the key match; its keys here are none"),
        ("rules:\n- match: a\n", 2, "a rule needs the key scheme; its keys here are match"),
        ("rules:\n- scheme: int8\n  type: Linear\n", 2, "a rule needs the key match; its keys here are scheme, type"),
        ("rules:\n- match: a\n  shceme: int8\n", 3, "a rule has no key 'shceme'; did you mean scheme"),
        ("rules:\n- match: a\n  match: b\n  scheme: int8", 3, "the key match stands here twice, first on line 2"),
        (RULE + "rules: []\n", 4, "the key rules stands here twice, first on line 1"),
        (
            "rules:\n- a: int8\n- '*': int44\n",
            3,
            "unknown scheme 'int44': no element is called 'int44'; did you mean int4",
        ),
        ("rules:\n- a: int4-g12x\n", 2, "'g12x' is not understood"),
        ("rules:\n- a:\n", 2, "a scheme should stand here; keep leaves modules in full precision"),
        ("rules:\n- match: a\n  scheme: ''\n", 3, "a scheme should stand here"),
        ("rules:\n- a: [int8]\n", 2, "text should stand here, not a list"),
        ("rules:\n- match: 'a{'\n  scheme: int8\n", 2, "a { is never closed"),
        ("rules:\n-\n  scheme: int8\n  match: re:(\n", 4, 'the pattern "re:(" is broken'),
        (RULE + "  type: a.b\n", 2, "a type is a class or its bare name, got 'a.b'"),
        (RULE + "  type: {}\n", 4, "type is a class name or a list of them, not a mapping"),
        (RULE + "  min_size: 1e6\n", 4, "a whole number from 0 on should stand here, not '1e6'"),
        (RULE + "  min_size: -3\n", 4, "a whole number from 0 on should stand here, not '-3'"),
        (RULE + "  min_size: '3'\n", 4, "a whole number from 0 on should stand here, not '3'"),
        (RULE + "  max_size: 0x10\n", 4, "a whole number from 0 on should stand here, not '0x10'"),
        (RULE + f"  max_size: {'9' * 5000}\n", 4, "a whole number from 0 on should stand here"),
        (RULE + f"  max_size: {2**63}\n", 2, "max_size is a number of weights"),
        (RULE + "  min_size: []\n", 4, "a whole number from 0 on should stand here, not a list"),
        (RULE + "  min_size: 4\n  max_size: 3\n", 2, "min_size 4 is larger than max_size 3"),
        (RULE + "  optional: maybe\n", 4, "true or false should stand here, not 'maybe'"),
        (RULE + "  scale: absmaks\n", 4, "did you mean absmax?"),
        (RULE + "misfit: shirnk\n", 4, "misfit cannot be 'shirnk'; did you mean shrink?"),
        (RULE + "misfit:\n", 4, "misfit cannot be ''"),
        (RULE + "scale: [absmax]\n", 4, "text should stand here, not a list"),
        (RULE + "defaults: 3\n", 4, "true or false should stand here, not '3'"),
        (RULE + "exclude: {a: b}\n", 4, "exclude is a list of patterns, not a mapping"),
        (RULE + "exclude:\n- 'a['\n", 5, "a [ is never closed"),
        ("rules:\n- *.mlp: int8\n", 2, "patterns that start with * { [ ? ! or & need quotes"),
        ("rules:\n- *mlp: int8\n", 2, "not YAML: found undefined alias 'mlp'"),
        ("rules:\n- {0..3}.x: int8\n", 2, "not YAML: "),
        ("rules:\n- {a,b}: int8\n", 2, "text should stand here, not a mapping; does a pattern lack its quotes?"),
        ("rules:\n- a: int8\n\t- b: int8\n", 3, "not YAML: "),
        ("rules:\n- a: 'int8\n", 3, "not YAML: found unexpected end of stream"),
        ("rules:\n- !x a: int8\n", 2, "text that starts with ! needs quotes"),
        ("rules:\n- !!python/name:os.system a: int8\n", 2, "is not honoured"),
        ("rules:\n- a: !!python/object/apply:os.system ['true']\n", 2, "text should stand here, not a list"),
        ("rules:\n- a: int8\n---\nrules:\n- b: int8\n", 3, "not YAML: but found another document"),
        ("rules:\n- a: 'in\x00t8'\n", 2, "not YAML: unacceptable character #x0000"),
        ("rules: &x [*x]\n", 1, "a rule is a mapping"),
        ("<<: {a: b}\n", 1, "a recipe has no key '<<'"),
    ],
)
def test_faults_are_named_by_file_line_and_nearest_word(tmp_path: Path, text: str, line: int, fact: str) -> None:
    with pytest.raises((RecipeError, SchemeError)) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}, line {line}: ")
    assert fact in message
    stood = (text.splitlines() or [""])[line - 1].strip() if line <= len(text.splitlines()) else ""
    assert message.splitlines()[-1].startswith(f"  line {line}: {stood[:97]}".replace("\x00", "?"))
    assert isinstance(caught.value, SchemeError) == (": unknown scheme" in message.splitlines()[0])


@settings(deadline=None)
@given(content=st.binary(max_size=60) | st.text("rules:-am{}[]*&!|>'\"\n  ?,#%@`~", max_size=60).map(str.encode))
def test_no_file_does_worse_than_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(FxquantError, match=r"recipe\.yaml"):
        Recipe.from_file(path)


def test_deep_nesting_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nested too deeply to be a recipe"):
        read(tmp_path, "[" * 100_000)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="it is not UTF-8 text, see byte 7"):
        read(tmp_path, b"rules: \xff\xfe")
    with pytest.raises(FileError, match="it is longer than 1,000,000 bytes"):
        read(tmp_path, b"#" * (LONGEST_FILE + 1))
    with pytest.raises(RecipeError, match="the file is empty"):
        read(tmp_path, b"#" * LONGEST_FILE)
