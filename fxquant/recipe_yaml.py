"""Recipes as YAML files, with errors that name file, line and the nearest word.

    rules:                              # the first that matches decides
      - lm_head: int8                   # short form, pattern: scheme
      - match: "*.mlp.*"                # long form; patterns that start with * { [ ? ! need quotes
        scheme: int4-g64                # keep: leave in full precision
        type: Linear                    # or a list of class names
        min_size: 1024                  # numbers of weights
        max_size: 1000000
        scale: absmax
        optional: true
    exclude: ["*.q_proj"]
    misfit: shrink
    scale: least_squares
    defaults: true

Files are data from elsewhere: no tag is honoured, no object is made, and size and depth are bounded.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml

from fxquant.codecs import ScaleSearch
from fxquant.errors import FileError, FxquantError, RecipeError, nearest
from fxquant.misfits import check_misfit
from fxquant.name_match import compile_name_pattern
from fxquant.rule import KEEP, Rule, check_scale, to_scheme

LONGEST_FILE = 1_000_000
"""Bytes; a rule takes about fifty."""
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value"))
"""What YAML takes an untagged scalar for. Here it is always text: `on`, `1.10` and `2001-01-01` can be names."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Document:
    """The text of a file, for errors that point into it."""

    path: Path
    lines: tuple[str, ...]

    def error(self, where: yaml.Node | int, problem: str, kind: type[FxquantError] = RecipeError) -> FxquantError:
        line = where if isinstance(where, int) else where.start_mark.line
        text = self.lines[line].strip() if line < len(self.lines) else ""
        text = "".join(character if character.isprintable() else "?" for character in text)
        shown = text if len(text) <= 100 else text[:97] + "..."
        return kind(f"{self.path}, line {line + 1}: {problem}\n  line {line + 1}: {shown}")

    def locate(self, node: yaml.Node, make: Callable[..., _T], *args: Any, **options: Any) -> _T:
        """`make(*args, **options)`; an error of ours in it gets the place of `node`."""
        try:
            return make(*args, **options)
        except FxquantError as error:
            raise self.error(node, str(error), type(error)) from None


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keyword arguments of `Recipe` that a YAML file holds.

    Raises:
        FileError: the file cannot be read, is not UTF-8, or is longer than a recipe can be.
        RecipeError: it is not YAML, or a key or value in it is not understood; names file, line and the nearest word.
        SchemeError: likewise, for a scheme that does not exist.
    """
    document, root = _compose(Path(path))
    if root is None:
        raise document.error(0, "the file is empty: a recipe needs rules")
    found = _mapping(document, root, _RECIPE_KEYS, "a recipe")
    if "rules" not in found:
        raise document.error(root, f"a recipe needs the key rules; the keys here are {', '.join(found) or 'none'}")
    if not found["rules"] and not found.get("exclude"):
        raise document.error(root, "the recipe has no rules")
    return found


def write_recipe(path: str | os.PathLike[str], rules: Iterable[Rule], **settings: str | bool) -> None:
    """Write rules and the other keys of a recipe as YAML; a file that is there is replaced as a whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    data = {"rules": [_rule_data(rule) for rule in rules], **settings}
    # Escaped, not allow_unicode: PyYAML would write some line separators as they are and read them back as spaces.
    text = yaml.safe_dump(data, sort_keys=False, width=10**9)
    try:
        # A link is written through, not replaced by a file.
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write("# fxquant recipe: the first rule that matches decides\n" + text)
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise FileError(f"cannot write the recipe {os.fspath(path)!r}: {_reason(error)}") from None


def _rule_data(rule: Rule) -> dict[str, Any]:
    if not rule.options and rule.match not in _RULE_KEYS:
        return {rule.match: rule.target}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in rule.options.items()}
    return {"match": rule.match, "scheme": rule.target, **options}


def _compose(path: Path) -> tuple[_Document, yaml.Node | None]:
    text = _read(path)
    document = _Document(path, tuple(text.splitlines()))
    try:
        return document, yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply to be a recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise document.error(
            line,
            f'not YAML: {problem}\n  patterns that start with * {{ [ ? ! or & need quotes: "*.mlp.*": int4',
        ) from None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read the recipe {str(path)!r}: {_reason(error)}{_neighbours(path)}") from None
    if len(content) > LONGEST_FILE:
        raise FileError(f"{path} is no recipe: it is longer than {LONGEST_FILE:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no recipe: it is not UTF-8 text, see byte {error.start}") from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _neighbours(path: Path) -> str:
    try:
        known = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return ""
    return nearest(path.name, known)


_Reader = Callable[[_Document, yaml.Node], Any]


def _mapping(document: _Document, node: yaml.Node, readers: Mapping[str, _Reader], what: str) -> dict[str, Any]:
    """The values of a mapping, each read by the reader of its key."""
    keys = ", ".join(readers)
    if not isinstance(node, yaml.MappingNode):
        raise document.error(node, f"{what} is a mapping with the keys {keys}, not {_kind(node)}")
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        key = _text(document, key_node)
        if key not in readers:
            raise document.error(key_node, f"{what} has no key {key!r}{nearest(key, readers)}\n  keys: {keys}")
        if key in found:
            raise document.error(key_node, f"the key {key} stands here twice, first on line {lines[key] + 1}")
        found[key], lines[key] = readers[key](document, value), key_node.start_mark.line
    return found


def _rule(document: _Document, node: yaml.Node) -> Rule:
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    patterns = [key for key in keys if _text(document, key) not in _RULE_KEYS]
    if len(keys) == len(patterns) == 1:
        match, scheme = node.value[0]
        return Rule(_pattern(document, match), _scheme(document, scheme))
    if len(keys) == len(patterns) > 1:
        raise document.error(patterns[1], "a second rule in one item: each rule has a dash and an item of its own")
    if isinstance(node, yaml.ScalarNode):
        raise document.error(node, f"a rule is a pattern and a scheme, such as {node.value!r}: int4; here is no scheme")
    options = _mapping(document, node, _RULE_KEYS, "a rule")
    for key in ("match", "scheme"):
        if key not in options:
            raise document.error(node, f"a rule needs the key {key}; its keys here are {', '.join(options) or 'none'}")
    return document.locate(node, Rule, options.pop("match"), options.pop("scheme"), **options)


def _rules(document: _Document, node: yaml.Node) -> list[Rule]:
    return [_rule(document, item) for item in _items(document, node, 'rules is a list of items such as - "*": int4')]


def _patterns(document: _Document, node: yaml.Node) -> list[str]:
    if isinstance(node, yaml.ScalarNode):
        return [_pattern(document, node)]
    return [_pattern(document, item) for item in _items(document, node, "exclude is a list of patterns")]


def _names(document: _Document, node: yaml.Node) -> tuple[str, ...]:
    if isinstance(node, yaml.ScalarNode):
        return (_text(document, node),)
    return tuple(_text(document, item) for item in _items(document, node, "type is a class name or a list of them"))


def _items(document: _Document, node: yaml.Node, rule: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise document.error(node, f"{rule}, not {_kind(node)}")
    return list(node.value)


def _text(document: _Document, node: yaml.Node) -> str:
    """The characters of a scalar as they stand there."""
    if not isinstance(node, yaml.ScalarNode):
        raise document.error(node, f"text should stand here, not {_kind(node)}; does a pattern lack its quotes?")
    if node.tag not in _PLAIN_TAGS:
        raise document.error(node, f"the tag {node.tag} is not honoured; a text that starts with ! needs quotes")
    return str(node.value)


def _pattern(document: _Document, node: yaml.Node) -> str:
    return document.locate(node, compile_name_pattern, _text(document, node)).source


def _scheme(document: _Document, node: yaml.Node) -> Any:
    text = _text(document, node)
    if not text:
        raise document.error(node, f"a scheme should stand here; {KEEP} leaves modules in full precision")
    return None if node.tag == f"{_TAG}null" else document.locate(node, to_scheme, text)


def _misfit(document: _Document, node: yaml.Node) -> Any:
    return document.locate(node, check_misfit, _text(document, node))


def _scale(document: _Document, node: yaml.Node) -> ScaleSearch:
    return document.locate(node, check_scale, _text(document, node))


def _flag(document: _Document, node: yaml.Node) -> bool:
    words = yaml.SafeLoader.bool_values
    if node.tag == f"{_TAG}bool" and node.value.lower() in words:
        return bool(words[node.value.lower()])
    raise document.error(node, f"true or false should stand here, not {_kind(node)}")


def _number(document: _Document, node: yaml.Node) -> int:
    digits = node.value.replace("_", "") if node.tag == f"{_TAG}int" else ""
    if not digits.isdecimal() or len(digits) > 19:
        raise document.error(node, f"a whole number from 0 on should stand here, not {_kind(node)}")
    return int(digits)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


_RULE_KEYS: Mapping[str, _Reader] = MappingProxyType(
    {
        "match": _pattern,
        "scheme": _scheme,
        "type": _names,
        "min_size": _number,
        "max_size": _number,
        "scale": _scale,
        "optional": _flag,
    }
)
_RECIPE_KEYS: Mapping[str, _Reader] = MappingProxyType(
    {
        "rules": _rules,
        "exclude": _patterns,
        "misfit": _misfit,
        "scale": _scale,
        "defaults": _flag,
    }
)
