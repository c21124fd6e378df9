"""The quantized matrices of files of which some are damaged: those that can be read, and why the others cannot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import FxquantError
from fxquant.families.detect import FAMILIES, FULL_PRECISION, family_of, find_weights
from fxquant.inspection.data import Notes

UNKNOWN = "unknown"
"""The format of files that do not tell it."""
_DEEPEST, _MOST_DAMAGED = 16, 1000
"""Parts of names, and modules, after which the search for what is damaged goes no further down."""
_Find = Callable[[CheckpointFiles], list[StoredWeight]]


@dataclass(frozen=True)
class Found:
    """The quantized matrices of a checkpoint."""

    format: str
    weights: list[StoredWeight]
    damaged: frozenset[str] = frozenset()
    """Modules whose matrices cannot be told."""
    understood: bool = True
    """Whether it is known which tensors are quantized."""


def find_matrices(files: CheckpointFiles, notes: Notes) -> Found:
    """As `find_weights`; where that fails, module by module."""
    try:
        return Found(*find_weights(files))
    except FxquantError as error:
        first = error
    try:
        family = family_of(files)
    except FxquantError as error:
        notes.problem("", error)
        return Found(UNKNOWN, [], understood=False)
    if not files.headers:
        return Found(family or FULL_PRECISION, [])  # that there are none has been noted
    if family is None or _fails(FAMILIES[family], restricted(files, ())):
        notes.problem("", first)
        return Found(family or FULL_PRECISION, [], understood=False)
    return _one_by_one(files, family, first, notes)


def _one_by_one(files: CheckpointFiles, family: str, first: FxquantError, notes: Notes) -> Found:
    search = _Search(files, FAMILIES[family], notes, set())
    weights = search.search("", list(files.headers))
    if not search.damaged:
        notes.problem("", first)
        return Found(family, weights, understood=bool(weights))
    if weights:
        rest = [name for name in files.headers if not is_below(name, search.damaged)]
        notes.tried(lambda: find_weights(restricted(files, rest)))
    return Found(family, weights, frozenset(search.damaged))


@dataclass(frozen=True)
class _Search:
    """Follows the names of tensors down to the modules at which reading fails."""

    files: CheckpointFiles
    find: _Find
    notes: Notes
    damaged: set[str]

    def search(self, prefix: str, names: list[str], depth: int = 0) -> list[StoredWeight]:
        """The matrices of the tensors `names`, all of which begin with `prefix`."""
        try:
            return self.find(restricted(self.files, names))
        except FxquantError as error:
            fault = error
        below: dict[str, list[str]] = {}
        for name in names:
            below.setdefault(name[len(prefix) :].partition(".")[0], []).append(name)
        ends = any(f"{prefix}{part}" in self.files.headers for part in below)
        if ends or depth == _DEEPEST or len(self.damaged) >= _MOST_DAMAGED:
            self.damaged.add(prefix.removesuffix("."))
            self.notes.problem(prefix.removesuffix("."), fault)
            return []
        parts = (self.search(f"{prefix}{part}.", inner, depth + 1) for part, inner in below.items())
        return [weight for part in parts for weight in part]


def restricted(files: CheckpointFiles, names: Iterable[str]) -> CheckpointFiles:
    """The same checkpoint with some of its tensors."""
    return replace(files, headers={name: files.headers[name] for name in names})


def is_below(name: str, modules: Set[str]) -> bool:
    """Whether a tensor is of one of these modules."""
    return "" in modules or any(one in modules for one in itertools.accumulate(name.split("."), "{}.{}".format))


def _fails(find: _Find, files: CheckpointFiles) -> bool:
    try:
        find(files)
    except FxquantError:
        return True
    return False
