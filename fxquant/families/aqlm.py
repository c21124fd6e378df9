"""AQLM checkpoints."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_aqlm
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.settings import settings_of
from fxquant.families.tensors import modules, require

SUFFIXES = ("codes", "codebooks", "scales")


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every module with codebooks.

    Raises:
        CheckpointError: settings that contradict the tensors, or a module that lacks one.
    """
    settings = settings_of(files)
    read = functools.partial(planes_of_aqlm, bits=settings.integer("nbits_per_codebook", high=32))
    kept = settings.names("linear_weights_not_to_quantize")
    found = modules(files, SUFFIXES, ("codebooks",))
    for module, pieces in found.items():
        require(module, pieces, *SUFFIXES)
        if f"{module}.weight" in kept or module in kept:
            raise settings.error(f"it leaves out {module}, and the files hold it quantized")
    return [StoredWeight(module, pieces, read) for module, pieces in found.items()]
