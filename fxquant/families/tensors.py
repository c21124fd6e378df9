"""The tensors of a checkpoint by the modules that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes
from fxquant.checkpoints.stored import Piece
from fxquant.errors import CheckpointError
from fxquant.families.names import Names, by_part
from fxquant.families.settings import Settings
from fxquant.scheme import Activation

Pieces = dict[str, Piece]
_MOST_DOTS = 2


def modules(files: CheckpointFiles, suffixes: Iterable[str], anchors: Iterable[str]) -> dict[str, Pieces]:
    """The modules that have one of the `anchors`, with all of their tensors that are called like one of `suffixes`.

    Args:
        files: the checkpoint.
        suffixes: names of tensors behind that of their module: `qweight`, `weight.absmax`.
        anchors: those that only a quantized module has.
    """
    known, marks = frozenset(suffixes), frozenset(anchors)
    found: dict[str, Pieces] = {}
    for name in files.headers:
        parts = name.split(".")
        for count in range(min(_MOST_DOTS + 1, len(parts) - 1), 0, -1):
            suffix = ".".join(parts[-count:])
            if suffix in known:
                found.setdefault(".".join(parts[:-count]), {})[suffix] = Piece(name)
                break
    return {module: pieces for module, pieces in found.items() if marks & pieces.keys()}


def require(module: str, pieces: Mapping[str, Piece], *suffixes: str) -> None:
    """Refuse a module that lacks a tensor.

    Raises:
        CheckpointError: it does.
    """
    missing = [suffix for suffix in suffixes if suffix not in pieces]
    if missing:
        raise CheckpointError(
            f"{module} has {', '.join(sorted(pieces))}, and lacks {', '.join(missing)}\n  the file is damaged"
        )


def without(pieces: Mapping[str, Piece], *suffixes: str) -> Pieces:
    """The pieces but for some, which belong to another layout: nobody claims them, and so they are refused."""
    return {suffix: piece for suffix, piece in pieces.items() if suffix not in suffixes}


def check_left_out(settings: Settings, patterns: Iterable[str], found: Iterable[str]) -> None:
    """Refuse a checkpoint whose config leaves out modules that are quantized.

    Raises:
        CheckpointError: it does.
    """
    check_excluded(settings, by_part(patterns), found)


def check_excluded(settings: Settings, excluded: Names, found: Iterable[str]) -> None:
    """Refuse a checkpoint that has quantized modules among those that its settings exclude.

    Raises:
        CheckpointError: it does.
    """
    for module in found:
        if entry := excluded.find(module):
            raise settings.error(f"it leaves out {entry[:80]!r}, and the files hold {module} quantized")


def read_with_activation(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    call: Callable[..., Planes],
    activation: Activation | None,
    **settings: Any,
) -> Planes:
    """`call` of the tensors, with the activation unless K does not consist of its groups.

    Raises:
        CheckpointError: by `call`.
    """
    if activation is not None and activation.group and k % activation.group:
        activation = None
    return call(tensors, n, k, activation=activation, **settings)
