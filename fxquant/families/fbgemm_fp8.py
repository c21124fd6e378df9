"""FBGEMM's FP8, a scale for each row; the experts of Llama 4 in it, which are stored transposed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes, planes_of_fp8
from fxquant.checkpoints.source import Source
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.experts import expert_weights, stacks
from fxquant.families.settings import settings_of
from fxquant.families.tensors import check_left_out, modules, require

SUFFIXES = ("weight", "weight_scale", "input_scale_ub")
STACKED = {"": "weight", "_scale": "scale"}


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `weight` with a `weight_scale`, and every expert.

    Activations stay as they are: no scheme has the bound that FBGEMM puts on their scales.

    Raises:
        CheckpointError: settings that contradict the tensors, or a module that lacks one.
    """
    settings = settings_of(files)
    found = modules(files, SUFFIXES, ("weight_scale",))
    check_left_out(settings, settings.names("modules_to_not_convert"), found)
    for module, pieces in found.items():
        require(module, pieces, "weight")
    experts = expert_weights(files, stacks(files, STACKED, ("_scale",)), _read_expert)
    return [*(StoredWeight(module, pieces, planes_of_fp8) for module, pieces in found.items()), *experts]


def _read_expert(tensors: Mapping[str, Tensor], n: int, k: int, *, half: int | None) -> Planes:
    """One projection of one expert: the transpose of `weight` `[K, N]`, or of half of its `2N` columns."""
    source = Source("FBGEMM FP8 experts", tensors, n, k)
    weight, scale = tensors.get("weight"), tensors.get("scale")
    if weight is None or scale is None:
        raise source.error("it lacks the weight or its scales")
    columns = n if half is None else 2 * n
    fits = tuple(weight.shape) == (k, columns) and scale.numel() == columns
    source.require(fits, f"it has the shape {list(weight.shape)}, and scales {list(scale.shape)}")
    rows = slice(None) if half is None else slice(half * n, (half + 1) * n)
    parts = {"weight": weight.t()[rows], "weight_scale": scale.reshape(-1, 1)[rows]}
    return planes_of_fp8(parts, n, k)
