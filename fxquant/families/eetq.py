"""EETQ checkpoints."""

from __future__ import annotations

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_eetq
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.settings import settings_of
from fxquant.families.tensors import check_left_out, modules, require, without


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `weight` with `weight_scales`.

    Raises:
        CheckpointError: settings that contradict the tensors, or a module that lacks one.
    """
    settings = settings_of(files)
    settings.word("weights", known=("int8",), default="int8")
    found = modules(files, ("weight", "qweight", "weight_scales"), ("weight_scales",))
    check_left_out(settings, settings.names("modules_to_not_convert"), found)
    result = []
    for module, pieces in found.items():
        codes, other = ("qweight", "weight") if "qweight" in pieces else ("weight", "qweight")
        require(module, pieces, codes)
        result.append(StoredWeight(module, without(pieces, other), planes_of_eetq))
    return result
