r"""Patterns over dotted module names: globs with `{}`, and regular expressions.

model.layers.0           that module and everything below it: so for every glob without `*`, `?` and `[`
*.mlp.*                  `*` any run of characters, dots too; `?` one character; `[0-9]`, `[!0-9]` one of a set
*.{q,k,v}_proj           alternatives, which may nest
model.layers.{0,2..5}    ranges of whole numbers, both ends included, in either order
re:.*\.(q|k)_proj        a regular expression that matches the whole name
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fxquant.errors import RecipeError

REGEX_PREFIX = "re:"
LONGEST_RANGE = 10_000
"""Numbers in one `{a..b}`: more than any model has layers or experts."""

_TOKEN = re.compile(r"(?P<star>\*+)|(?P<one>\?)|(?P<set>\[[!^]?\]?[^\]]*\])|(?P<mark>[{},])|(?P<text>[^*?\[{},]+|\[)")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})(?=[,}])")

# The last part of a name is spelled when literal characters alone match it. So while a pattern is tried for that, a
# character that a wildcard takes has a dot after it (or is one), and a star also may stop where the last part begins.
_BEFORE_LAST_PART = r"(?:(?<=\.)|(?=.*\.))"
_STAR_BEFORE_LAST_PART = r"(?:(?<![^.])|(?=.*\.))"


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern; made by `compile_name_pattern`."""

    source: str
    whole: re.Pattern[str]
    """Matches the names that the pattern reaches."""
    spelled: re.Pattern[str] | None
    """Matches the names of which a glob spells the last part; None: the pattern is a regular expression."""

    def matches(self, name: str) -> bool:
        """Whether the pattern reaches the module called `name`."""
        return self.whole.fullmatch(name) is not None

    def spells(self, name: str) -> bool:
        """Whether the pattern reaches `name` and gives its last part letter by letter, not through a wildcard.

        `lm_head`, `*lm_head`, `*.{lm_head,score}` and `re:.*lm_head` spell `lm_head`; `*`, `*_head`, `*lm_head*`,
        `lm_hea[d]` and `re:.*head` do not, nor does `model` spell what lies below it.
        """
        if not name or not self.matches(name):
            return False
        if self.spelled is not None:
            return self.spelled.fullmatch(name) is not None
        return _regex_spells(self.whole, name)


@functools.lru_cache(maxsize=4096)
def compile_name_pattern(source: str) -> NamePattern:
    """The pattern that `source` spells: a glob, or `re:` and a regular expression.

    Raises:
        RecipeError: an empty pattern, a broken regular expression or set, unbalanced braces, a range without numbers.
    """
    if not source.strip() or source == REGEX_PREFIX:
        raise RecipeError(f'a pattern is empty: {source!r}\n  "*" matches every module, "lm_head" one of them')
    if source.startswith(REGEX_PREFIX):
        return NamePattern(source, _compile(source.removeprefix(REGEX_PREFIX), source), None)
    whole = _translate(source, star=".*", one=".", after_set="")
    spelled = _translate(
        source, star=".*" + _STAR_BEFORE_LAST_PART, one="." + _BEFORE_LAST_PART, after_set=_BEFORE_LAST_PART
    )
    subtree = "" if has_wildcard(source) else r"(?:\..*)?"
    return NamePattern(source, _compile(f"(?:{whole}){subtree}", source), _compile(spelled, source))


def has_wildcard(glob: str) -> bool:
    """Whether `*`, `?` or `[` stands in a glob; braces are no wildcard, they spell what they stand for."""
    return any(mark in glob for mark in "*?[")


def _compile(regex: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(regex, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(f'the pattern "{source}" is broken: {error}') from None


def _translate(glob: str, *, star: str, one: str, after_set: str) -> str:
    """The regular expression of a glob, given what its wildcards stand for."""
    regex, depth, position = [], 0, 0
    while position < len(glob):
        if depth and glob[position - 1] in "{," and (found := _RANGE.match(glob, position)):
            regex.append(_range(int(found[1]), int(found[2]), glob))
            position = found.end()
            continue
        token = _TOKEN.match(glob, position)
        assert token is not None, "every character starts a token"
        position, kind, text = token.end(), token.lastgroup, token[0]
        if kind == "mark":
            depth += {"{": 1, "}": -1, ",": 0}[text]
            if depth < 0:
                raise RecipeError(f'unbalanced braces in "{glob}": a }} closes nothing')
            # A comma outside of braces is a character like any other.
            regex.append({"{": "(?:", "}": ")", ",": "|" if depth else ","}[text])
        elif kind == "text":
            regex.append(_literal(text, glob))
        else:
            regex.append({"star": star, "one": one}.get(str(kind)) or _set(text) + after_set)
    if depth:
        raise RecipeError(f'unbalanced braces in "{glob}": a {{ is never closed')
    return "".join(regex)


def _literal(text: str, glob: str) -> str:
    if text == "[":
        raise RecipeError(f'a [ is never closed in "{glob}"')
    if ".." in text:
        raise RecipeError(
            f'not a range: "{text.strip()}" in "{glob}"\n'
            "  a range stands in braces and is made of whole numbers: model.layers.{0..3}, model.layers.{0,4..7}"
        )
    return re.escape(text)


def _set(text: str) -> str:
    negated = text[1] in "!^" and len(text) > 3
    inner = re.sub(r"([][^&|~\\])", r"\\\1", text[2:-1] if negated else text[1:-1])
    return f"[{'^' if negated else ''}{inner}]"


def _range(first: int, last: int, glob: str) -> str:
    low, high = sorted((first, last))
    if high - low >= LONGEST_RANGE:
        raise RecipeError(f'the range {first}..{last} in "{glob}" is too long: {LONGEST_RANGE:,} numbers are the most')
    return "|".join(map(str, range(low, high + 1)))


def _regex_spells(regex: re.Pattern[str], name: str) -> bool:
    """Whether each character of the last part matters: another in its place, or one more after it, breaks the match."""
    head, dot, leaf = name.rpartition(".")
    return not any(all(regex.fullmatch(head + dot + edited) for edited in group) for group in _edits(leaf))


def _edits(leaf: str) -> Iterator[list[str]]:
    """Groups of words like `leaf`; a regular expression that matches a whole group has a wildcard there."""
    for i, character in enumerate(leaf):
        before, after = leaf[:i], leaf[i + 1 :]
        probes = "0123456789" if character.isdigit() else "JZ" if character.isupper() else "jz"
        yield [before + probe + after for probe in probes if probe != character]
        for probes in ("jz", "01234"):
            yield [before + character + probe + after for probe in probes]
