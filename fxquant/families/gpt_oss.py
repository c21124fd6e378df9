"""The MXFP4 experts of gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes, planes_of_gpt_oss
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families.experts import expert_weights, stacks
from fxquant.families.settings import settings_of
from fxquant.families.tensors import check_left_out, require

SUFFIXES = {"_blocks": "blocks", "_scales": "scales"}


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every expert of every stack of blocks.

    Raises:
        CheckpointError: settings that contradict the tensors; blocks without scales.
    """
    settings = settings_of(files)
    found = stacks(files, SUFFIXES, SUFFIXES)
    check_left_out(settings, settings.names("modules_to_not_convert"), [module for module, _ in found])
    for place, names in found.items():
        require(".".join(place), {key: Piece(name) for key, name in names.items()}, "blocks", "scales")
    return list(expert_weights(files, found, _read))


def _read(tensors: Mapping[str, Tensor], n: int, k: int, *, half: int | None) -> Planes:
    """One projection of one expert; rows of `gate_up_proj` alternate between gate (0) and up (1)."""
    rows = slice(half, None, None if half is None else 2)
    # A tensor without dimensions is refused by what reads it.
    return planes_of_gpt_oss({name: part[rows] if part.ndim else part for name, part in tensors.items()}, n, k)
