"""What became of the matrices of a checkpoint that was written in another format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from fxquant.plans import merged_name, name_pattern
from fxquant.tables import Table, bytes_text


@dataclass(frozen=True)
class Converted:
    """One matrix."""

    name: str
    """As the checkpoint that was read calls it."""
    n: int
    k: int
    before: str
    """Its scheme there, or a dtype."""
    after: str
    """Its scheme in the checkpoint that was written, or a dtype."""
    error: float | None
    """Relative squared error that was added; None: none at all."""
    reason: str = ""
    """Why it is not what was asked for."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was written; `print(conversion)` shows it as a table."""

    path: str
    format: str
    matrices: tuple[Converted, ...]
    nbytes: int
    """Of the files of tensors."""
    notes: tuple[str, ...] = ()
    """What is not there, and what programs that read the files do otherwise than the model."""
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    """The quantized model, on the meta device, for `fxquant.report`: where the format is fxquant's own."""

    @property
    def exact(self) -> bool:
        """Whether every weight is what it was, bit for bit."""
        return all(one.error is None for one in self.matrices)

    def table(self, *, full: bool = False) -> Table:
        """As a table; unless `full`, matrices that differ in the numbers of their names share a row."""
        groups: dict[Any, list[Converted]] = {}
        for one in self.matrices:
            key = one.name if full else (name_pattern(one.name), one.n, one.k, one.before, one.after, one.reason)
            groups.setdefault((key, one.error is None), []).append(one)
        return Table(
            title=f"{self.path}: {self.format}",
            columns=("weight", "shape", "from", "to", "error", "why"),
            rows=tuple(_row(group) for group in groups.values()),
            right=frozenset({4}),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        counts = Counter(one.error is None for one in self.matrices)
        yield (
            f"{len(self.matrices)} matrices: {counts[True]} are what they were, bit for bit; {counts[False]} are not, "
            "and error is the relative squared error that was added"
        )
        yield f"{bytes_text(self.nbytes)} of tensors"
        yield from self.notes

    def __str__(self) -> str:
        """The table, one row for matrices that differ in the numbers of their names alone."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        plain = {name: getattr(self, name) for name in ("path", "format", "nbytes", "notes", "exact")}
        return {**plain, "matrices": [asdict(one) for one in self.matrices]}


def _row(group: list[Converted]) -> tuple[str, ...]:
    first = group[0]
    errors = [one.error for one in group if one.error is not None]
    shown = f"{max(errors):.2e}" if errors else "exact"
    name = merged_name([one.name for one in group])
    return name, f"{first.n}x{first.k}", first.before, first.after, shown, first.reason
