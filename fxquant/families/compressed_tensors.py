"""Checkpoints of compressed-tensors, which llm-compressor writes: groups of modules with a format for each."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_compressed_tensors
from fxquant.checkpoints.stored import StoredWeight
from fxquant.families.activations import ELEMENTS, activation_of
from fxquant.families.names import by_regex
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import Pieces, check_excluded, modules, read_with_activation, require, without
from fxquant.scheme import Activation

ANCHORS = ("weight_packed", "weight_scale")
SUFFIXES = (
    *(*ANCHORS, "weight", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx"),
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
)
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
MIXED = "mixed-precision"
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
INPUT_STRATEGIES = (*STRATEGIES, "token", "attn_head")
_COMPRESSED = ("compressed", "frozen")
_CLASS = re.compile(r"[A-Z]\w*")


@dataclass(frozen=True)
class _Group:
    """What holds for the modules of some targets."""

    targets: tuple[str, ...]
    call: dict[str, Any]
    """Arguments of `planes_of_compressed_tensors`."""
    activation: Activation | None
    needs: tuple[str, ...]
    """Tensors without which its codes mean something else."""


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every module with packed codes or scales, with the settings of its group.

    Raises:
        CheckpointError: settings that contradict the tensors, or that cannot be read; sparse weights, transforms.
    """
    settings = settings_of(files)
    _check(settings)
    groups = [_group(group, settings) for group in settings.inners("config_groups").values()]
    if not groups:
        raise settings.error("config_groups is empty")
    found = modules(files, SUFFIXES, ANCHORS)
    check_excluded(settings, by_regex(settings.names("ignore")), found)
    named = [(by_regex(group.targets), group) for group in groups]
    classes = {target: group for group in groups for target in group.targets if _CLASS.fullmatch(target)}
    result = []
    for module, pieces in found.items():
        fitting = [(entry != module, group) for names, group in named if (entry := names.find(module)) is not None]
        chosen = min(fitting, key=itemgetter(0), default=(True, _by_class(classes, module)))[1]
        if chosen is None:
            raise settings.error(f"no group of config_groups has the target {module}, and the files hold it quantized")
        result.append(_weight(module, pieces, chosen))
    return result


def _by_class(classes: Mapping[str, _Group], module: str) -> _Group | None:
    """The group for the class of a module that no group names. The files do not say what class that is."""
    table = classes.get("Embedding") if "embed" in module.rpartition(".")[2] else None
    return table or classes.get("Linear") or next(iter(classes.values()), None)


def _check(settings: Settings) -> None:
    """Refuse what changes weights in ways that no scheme has."""
    for key in ("sparsity_config", "moe_sparsity_config"):
        sparsity = settings.inner(key)
        if sparsity.values and sparsity.text("format", default="dense") != "dense":
            raise sparsity.error("the weights are stored sparsely", "only dense weights can be read")
    if settings.inner("transform_config").inner("config_groups").values:
        raise settings.error("it has a transform_config", "weights that were rotated or scaled cannot be read")
    settings.word("quantization_status", known=_COMPRESSED, default="compressed")


def _group(group: Settings, settings: Settings) -> _Group:
    weight = group.inner("weights")
    if not weight.values:
        raise group.error("it does not quantize weights", "such a group cannot be read")
    layout = group.text("format", default="") or settings.text("format", default=MIXED)
    layout = Settings(group.place, {"format": layout}).word("format", known=FORMATS)
    call: dict[str, Any] = {"format": layout, "bits": weight.integer("num_bits", high=8)}
    size = weight.group_size(default=-1)
    default = "group" if size > 0 else "channel"
    match weight.word("strategy", known=STRATEGIES, default=default):
        case "group" | "tensor_group":
            call["group_size"] = size
        case "block":
            call["block_structure"] = weight.block("block_structure")
            if call["block_structure"] is None:
                raise weight.error("the strategy is block, and there is no block_structure")
    needs: tuple[str, ...] = ()
    if layout in _INTEGERS and weight.word("type", known=("int", "float"), default="int") == "int":
        needs += () if weight.flag("symmetric", True) else ("weight_zero_point",)
        needs += ("weight_g_idx",) if weight.get("actorder") in (True, "group") else ()
    return _Group(group.names("targets"), call, _activation(group.inner("input_activations")), needs)


def _activation(inputs: Settings) -> Activation | None:
    """How inputs are quantized, where a scheme says it; 4-bit and asymmetric activations stay as they are."""
    if not inputs.values or inputs.integer("num_bits", default=8, high=64) != 8 or not inputs.flag("symmetric", True):
        return None
    kind = ELEMENTS[inputs.word("type", known=("int", "float"), default="int")]
    if inputs.get("dynamic") == "local":
        return None
    dynamic = inputs.flag("dynamic")
    strategy = inputs.word("strategy", known=INPUT_STRATEGIES, default="token" if dynamic else "tensor")
    if strategy == "token" and not dynamic:
        raise inputs.error("dynamic is not true, and the strategy is token: each token would need a stored scale")
    return activation_of(kind, strategy, not dynamic, inputs.group_size(default=-1))


def _weight(module: str, pieces: Pieces, group: _Group) -> StoredWeight:
    codes, other = ("weight_packed", "weight") if "pack" in group.call["format"] else ("weight", "weight_packed")
    require(module, pieces, codes, "weight_scale", *group.needs)
    activation = group.activation
    if activation is not None and activation.static:
        require(module, pieces, "input_scale")
    read = functools.partial(
        read_with_activation, call=planes_of_compressed_tensors, activation=activation, **group.call
    )
    return StoredWeight(module, without(pieces, other), read)
