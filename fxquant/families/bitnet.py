"""BitNet checkpoints."""

from __future__ import annotations

import functools

import torch

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_bitnet
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.settings import settings_of
from fxquant.families.tensors import check_left_out, modules, require
from fxquant.scheme import Activation


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every uint8 `weight` with a `weight_scale`.

    Raises:
        CheckpointError: settings that contradict the tensors; norms inside of the linears.
    """
    settings = settings_of(files)
    kind = settings.word("linear_class", known=("bitlinear", "autobitlinear"), default="bitlinear")
    if settings.flag("use_rms_norm"):
        raise settings.error("use_rms_norm is true", "linears with a norm inside of them cannot be read")
    found = modules(files, ("weight", "weight_scale"), ("weight_scale",))
    check_left_out(settings, settings.names("modules_to_not_convert"), found)
    for module, pieces in found.items():
        require(module, pieces, "weight")
    found = {
        name: pieces for name, pieces in found.items() if files.headers[pieces["weight"].name].dtype == torch.uint8
    }
    read = functools.partial(planes_of_bitnet, linear_class=kind, activation=Activation("int8"))
    return [StoredWeight(module, pieces, read) for module, pieces in found.items()]
