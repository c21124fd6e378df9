"""AWQ checkpoints: of AutoAWQ and those that write its layouts."""

from __future__ import annotations

import functools

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_awq
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.errors import CheckpointError
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import check_left_out, modules, require

SIDE_FILES = ("quant_config.json", "quantize_config.json")
SUFFIXES = ("qweight", "qzeros", "scaled_zeros", "scales")
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_ACTIVATIONS = ("act.scales", "gelu_impl.scales")


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `qweight`.

    Raises:
        CheckpointError: settings that contradict each other or the tensors, or that cannot be read; activations with
            scales of their own, as the files of some old architectures have them.
    """
    settings = settings_of(files, *SIDE_FILES, same=("bits", "group_size", "version"))
    for name in files.headers:
        if name.endswith(_ACTIVATIONS):
            raise CheckpointError(
                f"{name} divides the output of an activation function\n  a checkpoint whose activations have scales of "
                "their own (Falcon, MPT, GPT-J, GPT-NeoX, BigCode, BLOOM) cannot be read"
            )
    found = modules(files, SUFFIXES, ("qweight",))
    check_left_out(settings, settings.names("modules_to_not_convert"), found)
    return [weight(module, pieces, settings) for module, pieces in found.items()]


def weight(module: str, pieces: dict[str, Piece], settings: Settings) -> StoredWeight:
    """The matrix of one module.

    Raises:
        CheckpointError: it lacks a tensor, or its settings cannot be read.
    """
    version = settings.word("version", "format", "checkpoint_format", known=VERSIONS, default="gemm")
    if "scaled_zeros" not in pieces:
        require(module, pieces, "qzeros")
    require(module, pieces, "scales")
    bits = settings.integer("bits", "w_bit", default=4, low=4, high=4)
    group_size = settings.group_size("group_size", "q_group_size", default=128)
    read = functools.partial(planes_of_awq, group_size=group_size, version=version, bits=bits)
    return StoredWeight(module, pieces, read)
