"""bitsandbytes checkpoints, of 4 and of 8 bits."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_bnb4, planes_of_bnb8
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.settings import configured
from fxquant.families.tensors import check_left_out, modules, require

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
SUFFIXES_4 = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES)
SUFFIXES_8 = ("weight", "SCB", "weight_format")
_LARGEST_THRESHOLD = 9999.0


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every weight with a quantization state, and every one with an `SCB`: the tensors say all but the threshold.

    Raises:
        CheckpointError: settings that contradict the tensors, or a module that lacks one.
    """
    four = modules(files, SUFFIXES_4, ("weight.absmax", *STATES))
    eight = modules(files, SUFFIXES_8, ("SCB",))
    settings = configured(files)
    threshold = 6.0
    if settings is not None:
        threshold = settings.number("llm_int8_threshold", 6.0, 0.0, _LARGEST_THRESHOLD)
        check_left_out(settings, settings.names("llm_int8_skip_modules"), [*four, *eight])
        says = {bits: settings.flag(f"load_in_{bits}bit") or settings.flag(f"_load_in_{bits}bit") for bits in (4, 8)}
        if says[4] == says[8]:
            raise settings.error(f"load_in_4bit and load_in_8bit are both {str(says[4]).lower()}")
        for bits, found in ((4, eight), (8, four)):
            if found and says[bits]:
                raise settings.error(f"load_in_{bits}bit is true, and {next(iter(found))} has {12 - bits} bits")
    for module, pieces in four.items():
        require(module, pieces, "weight", "weight.absmax", "weight.quant_map")
    for module, pieces in eight.items():
        require(module, pieces, "weight")
    # Thresholds are spelled with four digits behind the point, at most.
    read = functools.partial(planes_of_bnb8, threshold=round(threshold, 4))
    return [
        *(StoredWeight(module, pieces, planes_of_bnb4) for module, pieces in four.items()),
        *(StoredWeight(module, pieces, read) for module, pieces in eight.items()),
    ]
