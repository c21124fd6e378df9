"""The plan: every linear and every other matmul weight of one model, what it becomes, and why. Plain data."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fxquant.codecs import ScaleSearch
from fxquant.scheme import Scheme
from fxquant.speed_notes import Multiplied, speed_notes
from fxquant.tables import Table, bytes_text


@dataclass(frozen=True)
class PlanEntry:
    """One weight."""

    name: str
    """FQN of the linear module; FQN of the parameter where no linear module owns the weight."""
    kind: Literal["linear", "expert", "stacked", "bare"]
    """`expert`: one matrix of one expert of a stack, under the name that it has in checkpoints. `stacked`: any other
    parameter of three or more dimensions. `bare`: a matrix that is multiplied with by code that is not a linear module
    (a router's own weight)."""
    type: str
    """Class of the module that owns the weight."""
    shape: tuple[int, ...]
    """`(N, K)` for linears, whatever the module stores; the parameter's shape otherwise."""
    dtype: str
    bytes_before: int
    bytes_after: int
    scheme: Scheme | None = None
    """None: stays in full precision."""
    rule: int | None = None
    """Index of the rule that decided; None where none did."""
    rule_text: str = ""
    reason: str = ""
    """Why the weight stays as it is, or why it gets another scheme than its rule names."""
    aliases: tuple[str, ...] = ()
    """All FQNs of the module, where it has more than one."""
    transposed: bool = False
    """The module stores `[K, N]`."""
    scale: ScaleSearch = "least_squares"
    """How scales are chosen."""


@dataclass(frozen=True)
class Plan:
    """The recipe applied to one model; `print(plan)` shows it as a table."""

    entries: tuple[PlanEntry, ...]
    recipe: str
    """The recipe, printed."""
    graph: str
    """"captured", or why there is no graph: the plan then rests on the module tree alone."""
    other_bytes: int = 0
    """Bytes of all other parameters and buffers: embeddings, norms."""

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries that get a scheme."""
        return tuple(e for e in self.entries if e.scheme is not None)

    @property
    def kept(self) -> tuple[PlanEntry, ...]:
        """The entries that stay in full precision."""
        return tuple(e for e in self.entries if e.scheme is None)

    def __getitem__(self, name: str) -> PlanEntry:
        """The entry of this name, or of the module that has it as an alias."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, PlanEntry]:
        return {name: e for e in reversed(self.entries) for name in (*e.aliases, e.name)}

    def get(self, name: str) -> PlanEntry | None:
        """The entry of this name, or None."""
        try:
            return self[name]
        except KeyError:
            return None

    def table(self, *, full: bool = False) -> Table:
        """The plan as a table; unless `full`, layers that differ in their numbers alone share a row."""
        entries = self.entries if full else merge_layers(self.entries)
        rows = [
            (
                e.name,
                f"{'x'.join(map(str, e.shape))} {e.dtype}",
                str(e.scheme) if e.scheme else "keep",
                bytes_text(e.bytes_before),
                bytes_text(e.bytes_after),
                e.rule_text or "-",
                e.reason,
            )
            for e in entries
        ]
        before, after = (sum(getattr(e, f) for e in self.entries) for f in ("bytes_before", "bytes_after"))
        notes = [
            f"{len(self.quantized)} of {len(self.entries)} weights quantized; "
            f"{bytes_text(before)} become {bytes_text(after)}; other parameters stay: {bytes_text(self.other_bytes)}"
        ]
        notes += speed_notes(self._multiplied())
        if self.graph != "captured":
            notes.append(f"no graph: {self.graph}")
        return Table(
            title="plan",
            columns=("weight", "shape", "scheme", "before", "after", "rule", "why"),
            rows=tuple(rows),
            right=frozenset({3, 4}),
            notes=tuple(notes),
        )

    def _multiplied(self) -> list[Multiplied]:
        entries = [e for e in self.entries if len(e.shape) == 2]  # of a stack, a shape does not tell what a token reads
        return [Multiplied(e.shape[0], e.shape[1], e.bytes_before, e.scheme, e.kind == "expert") for e in entries]

    def __str__(self) -> str:
        """The table, one row for layers that differ in their numbers alone."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        rows = [
            {
                **{f: getattr(e, f) for f in PlanEntry.__dataclass_fields__},
                "scheme": str(e.scheme) if e.scheme else None,
            }
            for e in self.entries
        ]
        return {"recipe": self.recipe, "graph": self.graph, "other_bytes": self.other_bytes, "entries": rows}


def merge_layers(entries: Iterable[PlanEntry]) -> list[PlanEntry]:
    """Entries that differ only in the numbers of their names as one: `layers.{0..31}.mlp.up_proj`, bytes added."""
    groups: dict[Any, list[PlanEntry]] = {}
    for entry in entries:
        key = (
            name_pattern(entry.name),
            entry.shape,
            entry.dtype,
            entry.scheme,
            entry.rule_text,
            without_numbers(entry.reason),
            entry.kind,
        )
        groups.setdefault(key, []).append(entry)
    return [_merged(group) for group in groups.values()]


def name_pattern(name: str) -> str:
    """A name with each number that is a part of its own as `#`: the same for all layers of a kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$", "#", name)


def merged_name(names: Sequence[str]) -> str:
    """One name for several of one `name_pattern`: `model.layers.{0..31}.mlp.up_proj (32x)`."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=True)
    return f"{'.'.join(_spelled(column) for column in columns)} ({len(names)}x)"


def without_numbers(reason: str) -> str:
    """A reason with each number as `#`: the same for all layers of a kind."""
    return re.sub(r"\d+", "#", reason)


def _merged(group: list[PlanEntry]) -> PlanEntry:
    if len(group) == 1:
        return group[0]
    total = {f: sum(getattr(e, f) for e in group) for f in ("bytes_before", "bytes_after")}
    return replace(group[0], name=merged_name([e.name for e in group]), **total)


def _spelled(values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        return values[0]
    numbers = sorted({int(v) for v in values})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs) + "}"
