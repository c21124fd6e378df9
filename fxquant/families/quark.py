"""Checkpoints that AMD Quark exported."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_quark
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.activations import ELEMENTS, activation_of
from fxquant.families.names import by_glob
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import Pieces, check_excluded, modules, read_with_activation, require
from fxquant.scheme import Activation

SUFFIXES = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "output_scale")
DTYPES = ("fp8_e4m3", "int8", "int4", "uint4", "fp4")
PACK_METHODS = ("reorder", "order")
STRATEGIES = {"per_tensor": "tensor", "per_channel": "token", "per_token": "token", "per_group": "group"}
"""Schemes of activations; the channels of an activation are its tokens."""
_LINEAR = ("nn.Linear", "Linear", "<class 'torch.nn.modules.linear.Linear'>")


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `weight` with a `weight_scale`, with the settings of its layer, of linears, or of all.

    Raises:
        CheckpointError: settings that contradict the tensors, or that cannot be read.
    """
    settings = settings_of(files)
    export = settings.inner("export")
    export.word("weight_format", known=("real_quantized",), default="real_quantized")
    method = export.word("pack_method", known=PACK_METHODS, default="reorder")
    excluded, layers = settings.names("exclude"), settings.inners("layer_quant_config")
    types = settings.inners("layer_type_quant_config")
    general = next((types[name] for name in _LINEAR if name in types), settings.inner("global_quant_config"))
    found, names = modules(files, SUFFIXES, ("weight_scale",)), by_glob(layers)
    check_excluded(settings, by_glob(excluded), found)
    calibrated = any("input_scale" in pieces for pieces in found.values())
    result = []
    for module, pieces in found.items():
        require(module, pieces, "weight")
        own = layers.get(names.find(module) or "", general)
        activation = _activation(own.inner("input_tensors"), calibrated)
        if activation is not None and activation.static:
            require(module, pieces, "input_scale")
        result.append(_weight(module, pieces, own, method, activation))
    return result


def _weight(
    module: str, pieces: Pieces, settings: Settings, pack_method: str, activation: Activation | None
) -> StoredWeight:
    weight = settings.inner("weight")
    dtype = weight.word("dtype", known=DTYPES)
    if dtype in ("int4", "uint4") or (dtype == "int8" and not weight.flag("symmetric", True)):
        require(module, pieces, "weight_zero_point")
    read = functools.partial(
        read_with_activation,
        call=planes_of_quark,
        activation=activation,
        dtype=dtype,
        group_size=weight.group_size(default=-1),
        pack_method=pack_method,
    )
    return StoredWeight(module, pieces, read)


def _activation(inputs: Settings, calibrated: bool) -> Activation | None:
    """How inputs are quantized, where a scheme says it."""
    element = ELEMENTS.get(str(inputs.get("dtype")))
    strategy = STRATEGIES.get(str(inputs.get("qscheme")))
    if element is None or strategy is None or not inputs.flag("symmetric", True):
        return None
    static = not inputs.flag("is_dynamic")
    if static and not calibrated:
        return None
    return activation_of(element, strategy, static, inputs.group_size(default=-1))
