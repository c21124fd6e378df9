"""Checkpoints that NVIDIA ModelOpt exported."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_modelopt
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.activations import ELEMENTS
from fxquant.families.names import by_glob
from fxquant.families.settings import Settings, configured
from fxquant.families.tensors import Pieces, check_excluded, modules, read_with_activation, require
from fxquant.scheme import Activation

SIDE_FILE = "hf_quant_config.json"
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
MIXED = "MIXED_PRECISION"
ACTIVATIONS: Mapping[str, str] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "",
    "NVFP4": "",
    "W4A16_NVFP4": "",
    "W4A8_NVFP4_FP8": "fp8",
    "NVFP4_AWQ": "",
    "W4A16_AWQ": "",
    "W4A8_AWQ": "fp8",
    "MXFP4": "",
    "MXFP8": "",
    "W8A8_SQ_PER_CHANNEL": "int8",
}
"""The algorithms, and what their activations are quantized to, where a scheme says it."""


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `weight` with a `weight_scale`, under the algorithm of its module.

    Raises:
        CheckpointError: settings that contradict each other or the tensors, or that cannot be read.
    """
    settings = _settings(files)
    excluded = settings.names("exclude_modules") + settings.names("ignore")
    layers = settings.inners("quantized_layers")
    names = by_glob(layers)
    found = modules(files, SUFFIXES, ("weight_scale",))
    calibrated = any("input_scale" in pieces for pieces in found.values())
    check_excluded(settings, by_glob(excluded), found)
    result = []
    for module, pieces in found.items():
        require(module, pieces, "weight")
        own = settings
        if layers or settings.text("quant_algo", default="").upper() == MIXED:
            own = layers.get(names.find(module) or "", Settings("", {}))
            if not own.values:
                raise settings.error(f"quantized_layers has no entry for {module}, and the files hold it quantized")
        result.append(_weight(module, pieces, own, calibrated))
    return result


def _settings(files: CheckpointFiles) -> Settings:
    """Those of `config.json`, completed by those of the other file; they have to be of one mind."""
    config = configured(files) or Settings("config.json", {})
    side = Settings(SIDE_FILE, files.json(SIDE_FILE) or {}).inner("quantization")
    one, other = config.get("quant_algo"), side.get("quant_algo")
    if None not in (one, other) and str(one).upper() != str(other).upper():
        raise config.error(f"quant_algo is {str(one)[:40]!r}, and {str(other)[:40]!r} in {side.place}")
    return config.over(side)


def _weight(module: str, pieces: Pieces, settings: Settings, calibrated: bool) -> StoredWeight:
    algorithm = settings.word("quant_algo", known=ACTIVATIONS)
    if "NVFP4" in algorithm:
        require(module, pieces, "weight_scale_2")
    # Before ModelOpt quantizes an input, it multiplies it with `pre_quant_scale`: no scheme does both.
    scaled = "pre_quant_scale" in pieces
    dynamic = algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
    activation = None
    if ACTIVATIONS[algorithm] and calibrated and not dynamic:
        require(module, pieces, "input_scale")
    if ACTIVATIONS[algorithm] and not scaled and (dynamic or calibrated):
        activation = Activation(ELEMENTS[ACTIVATIONS[algorithm]], static=not dynamic)
    read = functools.partial(
        read_with_activation,
        call=planes_of_modelopt,
        activation=activation,
        quant_algo=algorithm,
        group_size=settings.group_size(default=128),
    )
    return StoredWeight(module, pieces, read)
