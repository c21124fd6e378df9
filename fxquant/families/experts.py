"""Experts that a checkpoint stacks into one tensor for each projection: `experts.gate_up_proj` `[E, 2I, H]`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.errors import CheckpointError

MOST_EXPERTS = 1 << 14
PROJECTIONS: Mapping[str, tuple[tuple[str, int | None], ...]] = MappingProxyType(
    {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
        "gate_proj": (("gate_proj", None),),
        "up_proj": (("up_proj", None),),
        "down_proj": (("down_proj", None),),
    }
)
"""What one stack becomes: names, and which half of its rows each is; None: all."""


def stacks(
    files: CheckpointFiles, suffixes: Mapping[str, str], anchors: Iterable[str]
) -> dict[tuple[str, str], dict[str, str]]:
    """By module and projection: the names of its tensors, by the names that a reader knows.

    Args:
        files: the checkpoint.
        suffixes: what follows the name of a projection, and what a reader calls such a tensor: `_scales`, `scales`.
        anchors: those suffixes that only a quantized stack has.
    """
    leaves = {name + suffix: (name, suffix) for name in PROJECTIONS for suffix in suffixes}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in files.headers:
        module, _, leaf = name.rpartition(".")
        if module and leaf in leaves:
            projection, suffix = leaves[leaf]
            found.setdefault((module, projection), {})[suffix] = name
    marks = frozenset(anchors)
    return {
        place: {suffixes[suffix]: name for suffix, name in names.items()}
        for place, names in found.items()
        if marks & names.keys()
    }


def expert_weights(
    files: CheckpointFiles, found: Mapping[tuple[str, str], Mapping[str, str]], read: Callable[..., Planes]
) -> Iterator[StoredWeight]:
    """The matrices of stacks, `<module>.<expert>.<projection>` each.

    Args:
        files: the checkpoint.
        found: as `stacks` gives them.
        read: takes the tensors of one expert, N, K and `half`: 0, 1 or None for all of the rows.

    Raises:
        CheckpointError: tensors of one stack that do not have the same number of experts, or none, or far too many.
    """
    for (module, projection), names in found.items():
        count = _count(files, f"{module}.{projection}", names)
        readers = [(name, functools.partial(read, half=half)) for name, half in PROJECTIONS[projection]]
        for expert in range(count):
            pieces = {key: Piece(name, expert) for key, name in names.items()}
            for name, reader in readers:
                yield StoredWeight(f"{module}.{expert}.{name}", pieces, reader)


def _count(files: CheckpointFiles, stack: str, names: Mapping[str, str]) -> int:
    shapes = {name: files.headers[name].shape for name in names.values()}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or min(min(shape, default=0) for shape in shapes.values()) < 1 or max(counts) > MOST_EXPERTS:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise CheckpointError(f"{stack} is no stack of experts: {told}\n  the first dimension counts them in every one")
    return counts.pop()
