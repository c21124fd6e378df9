"""What is in a checkpoint, and what is wrong with it, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fxquant.inspection import HeldWeight, Inspection, Problem
from fxquant.plans import merged_name, name_pattern, without_numbers
from fxquant.tables import Table, bytes_text

_MOST_PROBLEMS = 40
"""Lines of a table of problems."""


def checkpoint_tables(found: Inspection, *, full: bool = False) -> list[Table]:
    """A heading, the tensors by type, the weights of the model, and what is wrong.

    Args:
        found: by `fxquant.inspect`.
        full: one row per weight, and one line per problem; else layers that differ in their numbers alone share one,
            and vectors do.
    """
    tables = [_heading(found), _kinds(found), _weights(found, full)]
    for title, some in (("problems", found.problems), ("remarks", found.remarks)):
        if some:
            tables.append(_problems(title, some, full))
    return [table for table in tables if table.rows]


def _heading(found: Inspection) -> Table:
    rows = [(name, printable(text)) for name, text in _facts(found) if text]
    return Table(title="checkpoint", columns=("directory or file", printable(found.path)), rows=tuple(rows))


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "format", found.format + (f" ({found.variant})" if found.variant else "")
    yield "settings", ", ".join(f"{name} {_value(value)}" for name, value in found.settings.items())
    yield "made by", found.producer
    yield "model", _model(found)
    yield "quantized", _quantized(found)
    yield "not quantized", _rest(found)
    yield "bits", _bits(found)
    size = bytes_text(sum(file.nbytes for file in found.files))
    yield "files", f"{len(found.files)} of {size}" if found.files else "none that can be read"
    yield "tokenizer", "there is one" if found.tokenizer else "none"
    seen = "" if found.complete else ", as far as headers tell: numbers were not looked at"
    yield "problems", (f"{len(found.problems)}, see below" if found.problems else "none found") + seen


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model(found: Inspection) -> str:
    if not found.model:
        return f"not known ({found.model_type})" if found.model_type else "not known"
    return f"{found.model} ({found.model_type}), {found.dtype}, {found.parameters:,} parameters"


def _quantized(found: Inspection) -> str:
    if not found.model:
        return ""
    if not found.schemes:
        return "nothing"
    about = "" if found.complete else "about: "
    if len(found.schemes) == 1:
        return f"{about}{len(found.quantized)} matrices, all in {next(iter(found.schemes))}"
    parts = ", ".join(f"{count} in {scheme}" for scheme, count in found.schemes.items())
    return f"{about}{len(found.quantized)} matrices: {parts}"


def _rest(found: Inspection) -> str:
    rest = [one for one in found.weights if one.scheme is None and one.bits]
    dtypes = ", ".join(dict.fromkeys(one.dtype for one in rest))
    size = bytes_text(sum(one.nbytes for one in rest))
    return f"{len(rest)} tensors in {dtypes}: {size}" if rest and found.model else ""


def _bits(found: Inspection) -> str:
    weight, parameter = found.bits_per_weight, found.bits_per_parameter
    parts = [f"{weight:.4g} per quantized weight"] if weight is not None else []
    parts += [f"{parameter:.4g} per parameter of the model, by all bytes of the tensors"] if parameter else []
    return ", ".join(parts)


def _kinds(found: Inspection) -> Table:
    rows = [(kind.dtype, str(kind.tensors), f"{kind.elements:,}", bytes_text(kind.nbytes)) for kind in found.kinds]
    return Table(
        title="tensors in the files",
        columns=("type", "tensors", "elements", "bytes"),
        rows=tuple(rows),
        right=frozenset({1, 2, 3}),
    )


def _weights(found: Inspection, full: bool) -> Table:
    groups: dict[Any, list[HeldWeight]] = {}
    for one in found.weights:
        groups.setdefault(one.name if full else _key(one), []).append(one)
    # vectors are the least of it: they come last
    ordered = sorted(groups.values(), key=lambda group: not full and _is_vector(group[0]))
    return Table(
        title="weights of the model" if found.model else "tensors in the files, one by one: no model is known for them",
        columns=("weight", "shape", "kind", "held as", "bits", "bytes", "note"),
        rows=tuple(_row(group) for group in ordered),
        right=frozenset({4, 5}),
    )


def _key(one: HeldWeight) -> Any:
    if _is_vector(one):
        return one.dtype
    return name_pattern(one.name), one.shape, one.kind, one.scheme, one.dtype, without_numbers(one.note)


def _is_vector(one: HeldWeight) -> bool:
    return one.scheme is None and len(one.shape) < 2 and not one.note


def _row(group: list[HeldWeight]) -> tuple[str, ...]:
    first, nbytes = group[0], sum(one.nbytes for one in group)
    shape, kind = "x".join(map(str, first.shape)), first.kind
    if len({name_pattern(one.name) for one in group}) > 1:
        kinds = {one.kind for one in group}
        name, shape, kind = f"vectors ({len(group)}x)", "", first.kind if len(kinds) == 1 else ""
    else:
        name = merged_name([one.name for one in group])
    held = first.scheme or first.dtype or "-"
    bits = f"{first.bits:.4g}" if first.bits else "-"
    return tuple(map(printable, (name, shape, kind, held, bits, bytes_text(nbytes) if nbytes else "-", first.note)))


def _problems(title: str, found: Iterable[Problem], full: bool) -> Table:
    groups: dict[Any, list[Problem]] = {}
    for one in found:
        key = one if full else (name_pattern(one.place), without_numbers(one.text))
        groups.setdefault(key, []).append(one)
    shown = list(groups.values()) if full else list(groups.values())[:_MOST_PROBLEMS]
    rows = [
        (printable(merged_name([one.place for one in group]) or "the checkpoint"), _sentence(group[0].text))
        for group in shown
    ]
    more = len(groups) - len(shown)
    notes = (f"and {more} more: --full shows them",) if more else ()
    return Table(title=title, columns=("where", "what"), rows=tuple(rows), notes=notes)


def _sentence(text: str) -> str:
    return printable("; ".join(line.strip() for line in text.splitlines()))


def printable(text: str) -> str:
    """A text of a file that may hold anything, such as codes that a terminal obeys: those are shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
