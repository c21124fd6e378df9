"""Rules that decided nothing -> one error that says why, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence, Set

from fxquant.errors import RecipeError
from fxquant.name_match import REGEX_PREFIX, compile_name_pattern
from fxquant.recipe import Recipe
from fxquant.rule import Rule

_SHOWN = 8
"""Places or names that an error lists before it says how many more there are."""


def unmatched(recipe: Recipe, used: Set[int], names: Sequence[str]) -> RecipeError | None:
    """The error for the rules of `recipe` that decided nothing, or None where each did or may do without.

    Args:
        recipe: the recipe.
        used: indices of the rules that decided at least one module.
        names: names of all modules that rules can decide, protected ones too.
    """
    unused = [i for i, rule in enumerate(recipe.rules) if i not in used and not rule.optional]
    if not unused:
        return None
    lines = [line for i in unused for line in _explain(recipe.rules, i, names)]
    lines.append(f"  linears in this model live under: {places(names) or 'nowhere, there are none'}")
    lines.append("  a rule that may match nothing says so: Rule(..., optional=True)")
    return RecipeError("\n".join(lines))


def places(names: Iterable[str]) -> str:
    """Where modules live, numbers collapsed: `model.layers.*.self_attn, model.layers.*.mlp, lm_head`."""
    return _list(dict.fromkeys(collapse(name.rpartition(".")[0]) or name or "the model itself" for name in names))


def collapse(name: str) -> str:
    """A name with `*` for each of its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _list(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _explain(rules: Sequence[Rule], index: int, names: Sequence[str]) -> Iterator[str]:
    rule, number = rules[index], index + 1
    pattern = compile_name_pattern(rule.match)
    reached = [name for name in names if pattern.matches(name)]
    if not reached:
        likely = _corrections(rule.match, names) or _similar(rule.match, names)
        hint = f"; did you mean {', '.join(likely)}?" if likely else ""
        yield f'rule {number} matched nothing: "{rule.match}"{hint}'
        return
    fitting = _list(dict.fromkeys(map(collapse, reached)))
    yield f'rule {number} decides nothing, though the name fits: "{rule.match}" fits {fitting}'
    before = [i for i in range(index) if any(compile_name_pattern(rules[i].match).matches(name) for name in reached)]
    if before:
        earlier = ", ".join(f'{i + 1} ("{rules[i].match}")' for i in before[:_SHOWN])
        yield f"  the first rule that matches decides, and these stand before it: rule {earlier}"
    if rule.limits:
        yield f"  the rule also asks for {', '.join(rule.limits)}"
    if rule.scheme is not None and not all(map(pattern.spells, reached)):
        leaf = next(name for name in reached if not pattern.spells(name)).rpartition(".")[2]
        yield f'  a protected module is reached only by a rule that spells its last name part: "*.{leaf}"'


def _corrections(match: str, names: Sequence[str]) -> list[str]:
    """A pattern that is one slip away from `match` and does reach something."""
    is_regex = match.startswith(REGEX_PREFIX)
    prefix, front, back = (REGEX_PREFIX, ".*", ".*") if is_regex else ("", "*.", ".*")
    bare = match.removeprefix(REGEX_PREFIX) if is_regex else re.sub(r"\.(weight|bias|)$", "", match)
    tries = [
        prefix + edited
        for body in (bare, _respelled(bare, names))
        for edited in (body, body + back, front + body, front + body + back)
    ]
    if not is_regex:
        tries += [re.sub(r"\{[^{}]*\}|(?<![^.])\d+(?![^.])", "*", bare), f"*{bare}*"]
    return [f'"{source}"' for source in dict.fromkeys(tries) if _reaches(source, names)][:1]


def _respelled(body: str, names: Sequence[str]) -> str:
    """The pattern with each word that no name contains replaced by the name part most like it."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".")))
    everything = "\n".join(names)
    for word in _words(body):
        if word not in everything:
            close = difflib.get_close_matches(word, parts, n=1, cutoff=0.5)
            body = body.replace(word, close[0]) if close else body
    return body


def _similar(match: str, names: Sequence[str]) -> list[str]:
    """Names, or the names of what holds them, that look most like a pattern as a whole."""
    collapsed = list(dict.fromkeys(map(collapse, names)))
    parents = dict.fromkeys(name.rpartition(".")[0] for name in collapsed if "." in name)
    glob = re.sub(r"\{[^{}]*\}|\[[^]]*\]|\?|\*+|\\d\+?|\.[*+]", "*", match.removeprefix(REGEX_PREFIX)).replace("\\", "")
    return difflib.get_close_matches(glob, [*collapsed, *parents], n=3, cutoff=0.5)


def _words(match: str) -> list[str]:
    """The longer runs of literal characters in a pattern."""
    literal = re.sub(r"\\.|\[[^]]*\]", " ", match)
    return [word for word in re.findall(r"\w+", literal) if len(word) > 1 and not word.isdigit()]


def _reaches(glob: str, names: Sequence[str]) -> bool:
    try:
        pattern = compile_name_pattern(glob)
    except RecipeError:
        return False
    return any(map(pattern.matches, names))
