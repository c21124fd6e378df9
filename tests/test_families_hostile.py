"""Configs and names that are not what they should be: a clear error, or the right weights, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_directories import SETTINGS, read, write_checkpoint, write_extract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError, FxquantError
from fxquant.families import family_of, find_weights
from fxquant.families.names import by_glob, by_part, by_regex, compiled

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**70, -(10**4000), 0.5, float("nan"), float("inf")),
    *("", "x", "re:", "*", "(", "a" * 10_000, "auto", "32"),
    *([], [None], [[]], ["re:("], ["*"], [-1, 0], [2**70, 1], {}, {"a": None}, {"a": []}, {"": {"": {}}}),
]


class Changed(CheckpointFiles):
    """A checkpoint whose JSON was changed in memory."""

    sides: dict[str, Any]

    def json(self, name: str) -> dict[str, Any] | None:
        return self.sides.get(name)


def changed(files: CheckpointFiles, documents: dict[str, Any]) -> Changed:
    fields = {field.name: getattr(files, field.name) for field in dataclasses.fields(files)}
    result = Changed(**{**fields, "config": documents["config.json"]})
    result.sides = {name: side for name, side in documents.items() if name != "config.json"}
    return result


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a document, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: object) -> Any:
    """A copy of the document with another value at one place."""
    if not path:
        return copy.deepcopy(value)
    return {**document, path[0]: put(document[path[0]], path[1:], value)}


def survives(files: CheckpointFiles, expected: dict[str, Tensor]) -> None:
    """A matrix decodes, or is refused by an error of ours. What settings cannot tell apart may decode to anything."""
    error = ""
    try:
        found = {weight.name: weight for weight in find_weights(files)[1]}
        for module, values in expected.items():
            if module in found:
                scheme, planes = read(files, found[module], *values.shape)
                assert dequantize(planes, scheme, *values.shape).shape == values.shape
    except FxquantError as refused:
        error = str(refused)
    assert len(error) < 1200


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_every_kind(name: str, tmp_path: Path) -> None:
    files, _, expected = write_extract(tmp_path, name)
    documents = {"config.json": dict(files.config), **SETTINGS[name]["files"]}
    # Below `meta`, one key is read.
    every = [path for path in places(documents) if path[1:] and ("meta" not in path[:-1] or path[-1] == "quantizer")]
    for i, path in enumerate(every):
        for value in VALUES[i % 3 :: 3] if len(every) > 40 else VALUES:
            survives(changed(files, put(documents, path, value)), expected)


@pytest.mark.parametrize("name", ["torchao_int8wo"])
def test_metadata_of_every_kind(name: str, tmp_path: Path) -> None:
    files, _, expected = write_extract(tmp_path, name)
    (module,) = expected
    texts = ["", "{", "[]", "null", "7", '"x"', "{}", '{"_type": []}', '{"_type": "Int8Tensor"}', "[" * 100_000]
    texts += [f'{{"_type": "Int8Tensor", "_data": {{"block_size": {size}}}}}' for size in ("1", "[0, 1]", "[1, 1e9]")]
    texts += ['{"_type": "Int8Tensor", "_data": {"block_size": [1, 5]}, "_tensor_data_names": ["none"]}']
    for text in texts:
        files.metadata = {f"{module}.weight": text}
        with pytest.raises(CheckpointError):
            read(files, find_weights(files)[1][0], *expected[module].shape)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_is_needed_or_does_not_matter(name: str, tmp_path: Path) -> None:
    files, about, expected = write_extract(tmp_path, name)
    (module,) = expected
    n, k = expected[module].shape
    whole = dict(files.headers)
    for tensor in whole:
        files.headers = {key: header for key, header in whole.items() if key != tensor}
        try:
            scheme, planes = read(files, find_weights(files)[1][0], n, k)
        except CheckpointError:
            continue
        found = dequantize(planes, scheme, n, k)
        assert (found - expected[module]).abs().max() <= about["tolerance"] * 2.0**-23 * expected[module].abs().max()


@pytest.mark.parametrize("name", SETTINGS)
def test_other_families_refuse_it(name: str, tmp_path: Path) -> None:
    """Tensors under the settings of another format: an error, unless the formats share their tensors."""
    files, _, expected = write_extract(tmp_path, name)
    own = family_of(files)
    for other in SETTINGS:
        documents = {"config.json": SETTINGS[other]["config"], **SETTINGS[other]["files"]}
        given_files = changed(files, documents)
        if family_of(given_files) != own:
            survives(given_files, expected)


def test_names_at_the_edges(tmp_path: Path) -> None:
    """Tensors without a module, and modules without a name."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for name in ("qweight", ".qweight", "..qweight", "a..qweight", "qweight.qweight", "é.qweight"):
        files = write_checkpoint(tmp_path, {name: torch.zeros(8, 8, dtype=torch.int32)}, config)
        with pytest.raises(CheckpointError):
            find_weights(files)


EVIL = [
    *(
        r"(a+)+$",
        r"(a|a)*b",
        r"(a*)*",
        r"(.*)*x",
        r"(\w+\s?)*$",
        r"(?:a|b|ab)+c",
        r"((a{1,9}){1,9}){1,9}",
        r"(a?){50}b",
    ),
    *(".*" * 8 + "x", "a?" * 40 + "a" * 40, "(a|a)" * 40, r"(a)\1", r"(?P<x>a)(?P=x)", r"(a+){5}", r"(?:(?:.*)?)*"),
    *(r"(?x)(a+) +$", r"(?x:(a+) +)$", r"(a+)(?#c)+$", r"(?i:(a+)+)$"),
]
GOOD = [
    *(r".*\.18\..*gate.*", r".*lm_head", r".*self_attn.*", r".*(q|k|v|o)_proj$", r"model\.layers\.\d+\.mlp\.gate$"),
    *(r"model\.layers\.(0|1|2)\..*", r"^(?!.*experts).*$", r"[^.]+\.block_sparse_moe\.gate", r".*\.(?:0|1)\..*up.*"),
    *(
        r".*mlp\.experts\.\d+\.(gate|up|down)_proj.*",
        r"\(a\)",
        r"[(]*a[)+*]?",
        r"a{2,3}b",
        r".*?x",
        "lm_head",
        "(?i:A.*)",
        "(?i)A.*",
    ),
]


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_that_take_forever_are_refused(pattern: str) -> None:
    re.compile(pattern)  # they are regular expressions
    for call in (compiled, lambda text: by_regex([f"re:{text}"]), lambda text: by_part([text])):
        with pytest.raises(CheckpointError, match="forever"):
            call(pattern)


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_of_producers(pattern: str) -> None:
    assert compiled(pattern).pattern == pattern


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "a**", "(?<=a*)b", "(?P<1>a)", "\\"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="no regular expression"):
        compiled(pattern)
    with pytest.raises(CheckpointError, match="characters"):
        compiled(pattern * 1001)
    with pytest.raises(CheckpointError, match="characters"):
        by_glob(["*" * 1001])


def steps(pattern: str, text: str) -> int:
    """Of a matcher that backtracks, over `a`, `.`, `*`, `?`, `|` and groups: the paths it tries."""
    node, rest = alternatives(pattern)
    assert not rest
    count = 0

    def run(node: Any, at: int, then: Any) -> Iterator[None]:
        nonlocal count
        count += 1
        kind, *parts = node
        if kind == "one":
            if at < len(text) and parts[0] in (".", text[at]):
                yield from then(at + 1)
        elif kind == "any":
            for branch in parts:
                yield from run(branch, at, then)
        elif kind == "all":
            yield from run(parts[0], at, lambda to: run(("all", *parts[1:]), to, then)) if parts else then(at)
        elif kind == "?":
            yield from run(parts[0], at, then)
            yield from then(at)
        else:
            yield from run(parts[0], at, lambda to: run(node, to, then) if to > at else iter(()))
            yield from then(at)

    for _ in run(node, 0, lambda at: iter(())):
        raise AssertionError("nothing is asked for")
    return count


def alternatives(pattern: str) -> tuple[Any, str]:
    branches: list[list[Any]] = [[]]
    while pattern and pattern[0] != ")":
        first, pattern = pattern[0], pattern[1:]
        if first == "|":
            branches.append([])
        elif first in "*?":
            branches[-1][-1] = (first, branches[-1][-1])
        elif first == "(":
            node, pattern = alternatives(pattern)
            branches[-1].append(node)
            pattern = pattern[1:]
        else:
            branches[-1].append(("one", first))
    return ("any", *(("all", *branch) for branch in branches)), pattern


ATOMS = st.sampled_from(["a", ".", "b"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        inner.map(lambda part: f"({part})*"),
        inner.map(lambda part: f"({part})?"),
        ATOMS.map(lambda part: f"{part}*"),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(PATTERNS)
def test_what_is_accepted_takes_few_steps(pattern: str) -> None:
    """A name twice as long takes as many steps as a polynomial says, with a degree of the number of wildcards."""
    try:
        compiled(pattern)
    except CheckpointError:
        return
    degree = pattern.count("*")
    assert degree <= 4
    assert steps(pattern, "a" * 16) <= 2 ** (degree + 1) * steps(pattern, "a" * 8)


def test_lists_as_long_as_models() -> None:
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.up_proj" for i in range(60_000)]
    for form in (by_regex, by_glob, by_part):
        listed = form(names[1:])
        assert listed.find(names[-1]) == names[-1]
        assert listed.find("lm_head") is None


def test_which_modules_are_left_out() -> None:
    parts = by_part(["lm_head", "layers.1", "model.layers.*.attn", "fc1"])
    for name in ("lm_head", "layers.1", "layers.1.q", "model.layers.7.attn", "model.layers.7.attn.q", "x.fc1", "a_fc1"):
        assert parts.find(name) is not None, name
    for name in ("layers.11.q", "x.layers.1.q", "lm_head2", "model.layers.7.attn2", "fc1x", "layers"):
        assert parts.find(name) is None, name
    regex = by_regex(["a.b", "re:c.*d"])
    assert [regex.find(name) for name in ("a.b", "a.b.c", "axb", "cxd", "cxdx", "xcxd")] == [
        *("a.b", None, None, "re:c.*d", "re:c.*d", None)
    ]
    globs = by_glob(["a.b", "c.*", "*d"])
    assert [globs.find(name) for name in ("a.b", "a.b.c", "c.x.y", "xd", "xdx")] == ["a.b", None, "c.*", "*d", None]
