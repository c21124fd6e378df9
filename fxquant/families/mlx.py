"""MLX checkpoints, and those of transformers' `metal`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import Planes, planes_of_mlx
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families.experts import MOST_EXPERTS
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import Pieces, modules, require

KEY = "quantization"
SUFFIXES = ("weight", "scales", "biases", "qbiases")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
SWITCH, EXPERTS = "switch_mlp", "experts"
"""What MLX calls a stack of experts, and what everybody else calls them one by one."""
_GROUPS = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every uint32 `weight` with `scales`, and every expert of a stack of them.

    Raises:
        CheckpointError: settings that contradict the tensors, or that cannot be read.
    """
    own = Settings("config.json", files.config).inner(KEY)
    settings = own if own.values else settings_of(files)
    result: list[StoredWeight] = []
    for module, pieces in modules(files, SUFFIXES, ("scales",)).items():
        require(module, pieces, "weight")
        if files.headers[pieces["weight"].name].dtype not in (torch.uint32, torch.int32):
            continue
        read = _reader(settings, module)
        stacked = len(files.headers[pieces["weight"].name].shape) == 3
        each = _experts(files, module, pieces) if stacked else [(module, pieces)]
        result += [StoredWeight(name, parts, read) for name, parts in each]
    return result


def _reader(settings: Settings, module: str) -> functools.partial[Planes]:
    """With the bits, size of groups and mode of a module, which may have an object of its own among the settings."""
    if settings.values.get(module) is False:
        raise settings.error(f"{module} is false, and the files hold it quantized")
    if isinstance(settings.values.get(module), dict):
        settings = settings.inner(module).over(settings)
    mode = settings.word("mode", known=MODES, default="affine")
    return functools.partial(
        planes_of_mlx,
        mode=mode,
        bits=settings.integer("bits", default=4, low=2, high=8),
        group_size=settings.integer("group_size", default=_GROUPS[mode]),
    )


def _experts(files: CheckpointFiles, module: str, pieces: Pieces) -> Iterator[tuple[str, Pieces]]:
    """`layers.0.mlp.switch_mlp.gate_proj` as `layers.0.mlp.experts.<e>.gate_proj`."""
    parent, _, projection = module.rpartition(".")
    holder, _, switch = parent.rpartition(".")
    counts = {(*files.headers[piece.name].shape, 0)[0] for piece in pieces.values()}
    fits = switch in (SWITCH, EXPERTS) and len(counts) == 1 and 1 <= max(counts) <= MOST_EXPERTS
    if not fits:
        raise Settings("config.json", files.config).error(f"{module} is a stack of {sorted(counts)}, and of no experts")
    for expert in range(counts.pop()):
        parts = {suffix: Piece(piece.name, expert) for suffix, piece in pieces.items()}
        yield f"{holder}.{EXPERTS}.{expert}.{projection}".lstrip("."), parts
