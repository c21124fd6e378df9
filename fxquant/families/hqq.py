"""HQQ's own checkpoints: every layer has its settings with it."""

from __future__ import annotations

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_hqq
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.tensors import modules, require

SUFFIXES = (
    *("W_q", "scale", "zero", "shape", "axis", "group_size", "nbits", "packing", "quant_scale", "quant_zero"),
    *("unpack_view_dtype", "compute_dtype", "view_as_float", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `W_q`.

    Raises:
        CheckpointError: a layer that lacks a tensor.
    """
    found = modules(files, SUFFIXES, ("W_q",))
    for module, pieces in found.items():
        require(module, pieces, "scale", "zero", "shape", "packing")
    return [StoredWeight(module, pieces, planes_of_hqq) for module, pieces in found.items()]
