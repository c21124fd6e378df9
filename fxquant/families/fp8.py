"""FP8 checkpoints in the layout of DeepSeek and transformers: in blocks, per tensor, mxfp8, with FP4 experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes, planes_of_fp8
from fxquant.checkpoints.source import Source
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families.activations import activation_of
from fxquant.families.experts import expert_weights, stacks
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import Pieces, check_left_out, modules, read_with_activation, require
from fxquant.scheme import Activation

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
INPUTS = {"activation_scale": "activation_scale", "input_scale": "activation_scale", "qscale_act": "activation_scale"}
STACKED = {
    "": "weight",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_activation_scale": "activation_scale",
}
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
_MX = (1, 32)


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every 8-bit `weight` with scales, and every expert of a stack.

    Raises:
        CheckpointError: settings that contradict the tensors, or that cannot be read.
    """
    settings = settings_of(files)
    found = modules(files, ("weight", *SCALES, *INPUTS), SCALES)
    stacked = stacks(files, STACKED, ("_scale_inv", "_scale"))
    check_left_out(settings, settings.names("modules_to_not_convert", "ignored_layers"), found)
    result = []
    for module, pieces in found.items():
        if _is_coded(files, pieces):
            pieces = {INPUTS.get(suffix, suffix): piece for suffix, piece in pieces.items()}
            block, activation = _how(files, settings, module, pieces)
            read = functools.partial(
                read_with_activation, call=planes_of_fp8, activation=activation, weight_block_size=block
            )
            result.append(StoredWeight(module, pieces, read))
    for place, names in stacked.items():
        pieces = {key: Piece(name, 0) for key, name in names.items()}
        if _is_coded(files, pieces):
            block, activation = _how(files, settings, ".".join(place), pieces)
            half = functools.partial(_read_half, block=block, activation=activation)
            result += expert_weights(files, {place: names}, half)
    return result


def _is_coded(files: CheckpointFiles, pieces: Pieces) -> bool:
    return "weight" in pieces and files.headers[pieces["weight"].name].dtype in CODES


def _how(
    files: CheckpointFiles, settings: Settings, module: str, pieces: Pieces
) -> tuple[tuple[int, int] | None, Activation | None]:
    """The block that shares a scale, and how the input is quantized.

    Raises:
        CheckpointError: the settings do not say it, or a static scale is not there.
    """
    if settings.text("quant_method", default="fp8").lower() == "mxfp8":
        return _MX, None
    block = _block(files, settings, next(pieces[name] for name in SCALES if name in pieces))
    if settings.word("activation_scheme", known=("dynamic", "static"), default="dynamic") == "static":
        require(module, pieces, "activation_scale")
        return block, Activation("fp8", static=True)
    return block, activation_of("fp8", "group" if block else "token", False, block[1] if block else 0)


def _block(files: CheckpointFiles, settings: Settings, scale: Piece) -> tuple[int, int] | None:
    """The block of the config; where it does not say any, transformers' default, unless scales are of no grid."""
    if "weight_block_size" in settings.values:
        return settings.block("weight_block_size")
    shape = files.headers[scale.name].shape[0 if scale.index is None else 1 :]
    return None if sum(size != 1 for size in shape) < 2 and scale.name.endswith("_scale") else (128, 128)


def _read_half(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    half: int | None,
    block: tuple[int, int] | None,
    activation: Activation | None,
) -> Planes:
    """One projection of one expert; `half`: of `gate_up_proj`, the first or the second half of the rows."""
    source = Source("FP8 experts", tensors, n, k)
    weight, name = tensors["weight"], next(name for name in SCALES if name in tensors)
    scale = tensors[name]
    if half is not None:
        source.require(
            weight.ndim == 2 and len(weight) == 2 * n, f"gate and up together have shape {list(weight.shape)}"
        )
        weight = weight[half * n : (half + 1) * n]
        coded = weight.dtype in (torch.int8, torch.uint8)
        scale, block = _half_of_scales(source, scale, half, _MX if coded else block)
    parts = {**tensors, "weight": weight, name: scale}
    return read_with_activation(parts, n, k, call=planes_of_fp8, activation=activation, weight_block_size=block)


def _half_of_scales(
    source: Source, scale: Tensor, half: int, block: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int] | None]:
    """The scales of one half, and the block that shares one.

    The grid may have been laid over both halves at once, and then blocks may reach over the border, or over each half.

    Raises:
        CheckpointError: it is neither, or may be both.
    """
    n = source.n
    if scale.numel() == 1:
        return scale, block
    if block is None and scale.numel() == 2:
        return scale.reshape(2)[half], None
    rows = block[0] if block else 1
    whole, each = math.ceil(2 * n / rows), math.ceil(n / rows)
    count = len(scale)
    source.require(count in (whole, 2 * each), f"gate and up together have scales of shape {list(scale.shape)}")
    if n % rows == 0 or count != whole:
        return scale[half * each : (half + 1) * each], block
    source.require(whole != 2 * each, f"N is no multiple of {rows}, and its scales may be of one grid or of two")
    finer = math.gcd(n, rows)
    first = torch.arange(half * n, (half + 1) * n, finer, device=scale.device)
    return scale.index_select(0, first // rows), (finer, block[1] if block else 0)
