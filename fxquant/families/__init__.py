"""From the files of a quantized checkpoint to the list of its quantized matrices: one module for each format.

Modules are found by the names of their tensors, never by a model; settings come from the config, resolved for each
module. Nothing of the files is trusted: not the types of settings, not patterns, not that names and tensors agree.
"""

from fxquant.families.detect import FAMILIES, FULL_PRECISION, family_of, find_weights

__all__ = ["FAMILIES", "FULL_PRECISION", "family_of", "find_weights"]
