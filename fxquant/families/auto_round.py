"""AutoRound checkpoints: GPTQ's or AWQ's tensors, or those of compressed-tensors, under settings of its own."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_compressed_tensors
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families import awq, gptq
from fxquant.families.names import compiled
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import modules, require, without

SIDE_FILE = "quantization_config.json"
PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round:llm_compressor": "floats",
    "auto_round:mxfp4": "floats",
    "auto_round:mxfp8": "floats",
    "auto_round:nvfp4": "floats",
}
"""Whose tensors they are: of GPTQ (whose v2 stores zero points as they are), AWQ, or small floats."""
FLOATS = {
    ("mx_fp", 4): "mxfp4-pack-quantized",
    ("mx_fp_rceil", 4): "mxfp4-pack-quantized",
    ("mx_fp", 8): "mxfp8-quantized",
    ("mx_fp_rceil", 8): "mxfp8-quantized",
    ("nv_fp", 4): "nvfp4-pack-quantized",
    ("nv_fp4_with_static_gs", 4): "nvfp4-pack-quantized",
}
"""What compressed-tensors calls a data type of so many bits."""
_INTEGERS = (*gptq.SUFFIXES,)
_FLOATS = ("weight_packed", "weight", "weight_scale", "weight_global_scale", "input_global_scale", "input_scale")
_MOST_BITS = 64
_FULL_PRECISION = 16


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every quantized module, with the settings that `extra_config` gives it.

    Raises:
        CheckpointError: settings that contradict each other or the tensors, or that cannot be read.
    """
    settings = settings_of(files, SIDE_FILE, same=("bits", "group_size", "sym", "packing_format"))
    packing = PACKINGS[settings.word("packing_format", known=PACKINGS, default="auto_round:auto_gptq")]
    if packing == "floats":
        found = modules(files, _FLOATS, ("weight_packed", "weight_scale"))
    else:
        found = modules(files, _INTEGERS, ("qweight",))
    extra = settings.inners("extra_config")
    # What names a module is no regular expression: `mlp.gate` would be found in `mlp.gate_proj`.
    patterns = [
        (compiled(name), entry)
        for name, entry in extra.items()
        if entry.values and name not in found and f"{name}.weight" not in files.headers
    ]
    result = []
    for module, pieces in found.items():
        by_regex = (entry for pattern, entry in patterns if pattern.search(module))
        own = extra[module] if module in extra else next(by_regex, settings)
        result.append(_weight(module, pieces, own.over(settings), packing))
    return result


def _weight(module: str, pieces: dict[str, Piece], settings: Settings, packing: str) -> StoredWeight:
    if settings.integer("bits", high=_MOST_BITS) >= _FULL_PRECISION:
        raise settings.error(f"it leaves {module} in {settings.get('bits')} bits, and the files hold it quantized")
    if packing == "awq":
        plain = {key: value for key, value in settings.values.items() if key in ("bits", "group_size")}
        return awq.weight(module, pieces, Settings(settings.place, plain))
    if packing != "floats":
        layout = {**settings.values, "checkpoint_format": packing, "format": None}
        return gptq.weight(module, pieces, Settings(settings.place, layout))
    kind = settings.word("data_type", known=sorted({name for name, _ in FLOATS}))
    layout_name = FLOATS.get((kind, settings.integer("bits")))
    if layout_name is None:
        raise settings.error(f"data_type is {kind} in {settings.get('bits')} bits", f"what can be read: {FLOATS}")
    codes, other = ("weight_packed", "weight") if "pack" in layout_name else ("weight", "weight_packed")
    require(module, pieces, "weight_scale", codes)
    return StoredWeight(
        module, without(pieces, other), functools.partial(planes_of_compressed_tensors, format=layout_name)
    )
