"""Which modules a config means: the regular expressions and globs of producers, which are not trusted either."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fxquant.errors import CheckpointError

REGEX = "re:"
LONGEST_PATTERN = 1000
MOST_WAYS = 1 << 26
"""In so many ways, at most, a pattern may match: each costs a step where a name does not match."""
_SPAN = 64
"""Characters of the name of a module: where an unbounded repetition may end."""
_PLAIN = re.compile(r"[\w.-]+")
_TOKEN = re.compile(
    r"(?P<text>\\[^1-9]|\[\^?\]?(?:\\.|[^]\\])*\]|\(\?[aiLmsu]+\))"
    # A reference, a condition; a comment or free spacing, by which a repetition may stand away from what it repeats.
    r"|(?P<never>\\[1-9]|\(\?P=|\(\?\(|\(\?#|\(\?[a-zA-Z-]*x)"
    r"|(?P<open>\((?:\?(?:[:=!>]|<[=!]|P<\w+>|[aiLmsu-]+:))?)|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<many>[*+]|\{\d*,?\d*\})|(?P<maybe>\?)|.",
    re.DOTALL,
)


def compiled(text: str) -> re.Pattern[str]:
    """The regular expression of a config.

    Raises:
        CheckpointError: it does not compile, is too long, or could take forever: repetitions of what itself varies,
            such as `(a|b)*`, or too many wildcards in a row.
    """
    _check_length(text)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    if _ways(text) > MOST_WAYS:
        raise CheckpointError(
            f"the pattern {shown!r} could take forever to match\n  write it without repetitions of alternatives or of "
            "other repetitions, and with at most four wildcards"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"the pattern {shown!r} is no regular expression: {error}") from None


def _ways(text: str) -> float:
    """An upper bound for the paths that a backtracking matcher can take through a pattern."""
    frames, atom, repeated = [[0.0, 1.0]], 1.0, False
    for token in _TOKEN.finditer(text):
        kind, frame = token.lastgroup, frames[-1]
        if repeated and token[0] in "?+":
            repeated = False  # a lazy or a possessive repetition
            continue
        repeated = kind in ("many", "maybe")
        if kind == "never":
            return math.inf
        if kind == "open":
            frames.append([0.0, 1.0])
        elif kind == "close" and len(frames) > 1:
            branches, last = frames.pop()
            atom = branches + last
            frames[-1][1] *= atom
        elif kind == "bar":
            frame[:] = [frame[0] + frame[1], 1.0]
        elif kind == "many":
            frame[1] *= _SPAN if atom == 1 else math.inf
        elif kind == "maybe":
            frame[1] *= 2
        else:
            atom = 1.0
    return sum(sum(frame) for frame in frames)


@dataclass(frozen=True)
class Names:
    """Entries of a config that name modules, in one of three ways: see `by_regex`, `by_glob` and `by_part`."""

    plain: frozenset[str]
    """Those that are looked up. There may be as many as modules, and so they are not all tried."""
    patterns: tuple[tuple[str, re.Pattern[str]], ...]
    """Those that are tried, from the start of a name on."""
    parts: bool = False
    """Whether plain entries also stand for what is below them, and for names that end like them."""

    def find(self, name: str) -> str | None:
        """The entry that a module falls under, or None."""
        if name in self.plain:
            return name
        if self.parts:
            ends = itertools.accumulate(name.split("."), "{}.{}".format)
            below = next((end for end in ends if end in self.plain), None)
            if below is not None or name.endswith(tuple(self.plain)):
                return below if below is not None else next(entry for entry in self.plain if name.endswith(entry))
        return next((entry for entry, pattern in self.patterns if pattern.match(name)), None)


def by_regex(entries: Iterable[str]) -> Names:
    """Names in full; and behind `re:` regular expressions, which match from the start on: compressed-tensors.

    Raises:
        CheckpointError: see `compiled`.
    """
    listed = list(entries)
    patterns = [(entry, compiled(entry.removeprefix(REGEX))) for entry in listed if entry.startswith(REGEX)]
    return Names(frozenset(entry for entry in listed if not entry.startswith(REGEX)), tuple(patterns))


def by_glob(entries: Iterable[str]) -> Names:
    """Globs of whole names: ModelOpt, Quark.

    Raises:
        CheckpointError: one is too long.
    """
    listed = list(entries)
    wild = [entry for entry in listed if set(entry) & set("*?[")]
    for entry in wild:
        _check_length(entry)
    patterns = tuple((entry, re.compile(fnmatch.translate(entry))) for entry in wild)
    return Names(frozenset(listed).difference(wild), patterns)


def by_part(entries: Iterable[str]) -> Names:
    """The entries of a `modules_to_not_convert`, as in transformers.

    Each is a regular expression that matches from the start of a name up to the end of one of its parts; or the end of
    a name.

    Raises:
        CheckpointError: see `compiled`.
    """
    listed = list(entries)
    plain = frozenset(entry for entry in listed if _PLAIN.fullmatch(entry))
    wild = [entry for entry in listed if entry not in plain]
    return Names(plain, tuple((e, compiled(rf"(?:{e})(?:(?<=\.)|(?=\.|$))")) for e in wild), parts=True)


def _check_length(text: str) -> None:
    if len(text) > LONGEST_PATTERN:
        raise CheckpointError(
            f"a pattern of {len(text)} characters: {text[:80]!r}...\n  {LONGEST_PATTERN} are the most"
        )
