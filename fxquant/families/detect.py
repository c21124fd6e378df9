"""Which format a checkpoint is in, and all of its quantized matrices: nothing that looks quantized is passed over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import CheckpointError, nearest
from fxquant.families import (
    aqlm,
    auto_round,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    eetq,
    fbgemm_fp8,
    fp8,
    gpt_oss,
    gptq,
    hqq,
    mlx,
    modelopt,
    quanto,
    quark,
    torchao,
    vptq,
)
from fxquant.families.experts import PROJECTIONS
from fxquant.families.settings import Settings, configured

FAMILIES: Mapping[str, Callable[[CheckpointFiles], list[StoredWeight]]] = MappingProxyType(
    {
        "aqlm": aqlm.weights,
        "auto-round": auto_round.weights,
        "awq": awq.weights,
        "bitnet": bitnet.weights,
        "bitsandbytes": bitsandbytes.weights,
        "compressed-tensors": compressed_tensors.weights,
        "eetq": eetq.weights,
        "fbgemm_fp8": fbgemm_fp8.weights,
        "fp8": fp8.weights,
        "gptq": gptq.weights,
        "hqq": hqq.weights,
        "metal": mlx.weights,
        "mlx": mlx.weights,
        "modelopt": modelopt.weights,
        "mxfp4": gpt_oss.weights,
        "mxfp8": fp8.weights,
        "quanto": quanto.weights,
        "quark": quark.weights,
        "torchao": torchao.weights,
        "vptq": vptq.weights,
    }
)
"""What finds the quantized matrices of a format, by the `quant_method` that configs give it."""
FULL_PRECISION = "full precision"
"""What a checkpoint is in that has no quantized matrix."""
ALIASES = {
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
}
SIDE_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
}
"""Files that tell the format where `config.json` does not."""
_CODES = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)
_SIGNS = frozenset(
    itertools.chain(
        *(family.SUFFIXES for family in (gptq, awq, quanto, torchao, fbgemm_fp8, compressed_tensors, modelopt, quark)),
        *(bitsandbytes.SUFFIXES_4, bitsandbytes.SUFFIXES_8, fp8.INPUTS, vptq.SUFFIXES, aqlm.SUFFIXES),
        *(("weight_scale_inv", "qscale_weight", "weight_scales", "W_q", "qbiases"),),
    )
) - {"weight", "scales", "perm", "indices", "codes", "output_scale"}
"""Names of tensors, behind that of a module, that only quantized weights have."""
_STACKED_SCALES = tuple(f"{name}_scale_inv" for name in PROJECTIONS)
_NO_WEIGHTS = ("position_ids", "token_type_ids", "tid2eid", "attn.bias", "attention.bias", "masked_bias")
"""Integers that are no weights: positions, types, hashed routes; masks in the files of old decoders."""


def find_weights(files: CheckpointFiles) -> tuple[str, list[StoredWeight]]:
    """The format of a checkpoint, a key of `FAMILIES`, and every quantized matrix of it.

    A checkpoint that is not quantized is in `FULL_PRECISION`, and has none. Activations are part of the schemes that
    the matrices are read to where a scheme says what the producer does; all others stay as they are.

    Raises:
        CheckpointError: an unknown format; settings that cannot be read, or that contradict each other or the tensors;
            tensors that look quantized and that belong to no matrix.
        FileError: a side file that is no JSON object.
    """
    family = family_of(files)
    if family is None:
        _check_rest(files, FULL_PRECISION, [])
        return FULL_PRECISION, []
    found = FAMILIES[family](files)
    _check_rest(files, family, found)
    if not found:
        raise CheckpointError(
            f"{files.path} says that it is quantized ({family}), and no tensor of it is\n"
            "  its config belongs to another file, or it is to be quantized as it is loaded"
        )
    return family, found


def family_of(files: CheckpointFiles) -> str | None:
    """The format, by the config, by files beside it or by what tensors are called; None: full precision.

    Raises:
        CheckpointError: a format that is not known, or settings that do not tell which.
        FileError: a side file that is no JSON object.
    """
    settings = configured(files)
    if settings is not None:
        stated = settings.get("quant_method") is not None
        method = settings.text("quant_method").lower() if stated else _method(settings, files)
        method = ALIASES.get(method, method)
        if method not in FAMILIES:
            raise settings.error(
                f"quant_method is {method[:40]!r}{nearest(method[:40], FAMILIES)}",
                f"what can be read: {', '.join(FAMILIES)}",
            )
        return method
    if Settings("config.json", files.config).inner(mlx.KEY).values:
        return "mlx"
    for name, family in SIDE_FILES.items():
        if files.json(name) is not None:
            return family
    side = files.json(auto_round.SIDE_FILE)
    if side is not None:
        method = Settings(auto_round.SIDE_FILE, side).word("quant_method", known=(*FAMILIES, *ALIASES))
        return ALIASES.get(method, method)
    signs = {"W_q": "hqq", torchao.ANCHOR: "torchao", bitsandbytes.STATES[0].rpartition(".")[2]: "bitsandbytes"}
    leaves = {name.rpartition(".")[2] for name in files.headers}
    return next((family for leaf, family in signs.items() if leaf in leaves), None)


def _method(settings: Settings, files: CheckpointFiles) -> str:
    """The format of settings that do not say it."""
    if settings.get("load_in_4bit", "_load_in_4bit") or settings.get("load_in_8bit", "_load_in_8bit"):
        return "bitsandbytes"
    if settings.get("config_groups") is not None:
        return "compressed-tensors"
    if settings.get("quant_algo") is not None:
        return "modelopt"
    if files.config.get(mlx.KEY) or {"group_size", "mode"} <= settings.values.keys():
        return "mlx"
    raise settings.error("there is no quant_method", f"it has to say what the format is: {', '.join(FAMILIES)}")


def _check_rest(files: CheckpointFiles, family: str, found: Sequence[StoredWeight]) -> None:
    """Refuse names that stand twice, and tensors that look quantized and that no matrix has.

    Raises:
        CheckpointError: there are such.
    """
    claimed = {piece.name for weight in found for piece in weight.pieces.values()}
    names: set[str] = set()
    for weight in found:
        plain = f"{weight.name}.weight"
        if weight.name in names or (plain in files.headers and plain not in claimed):
            raise CheckpointError(f"{files.path} holds {weight.name} twice\n  the file is damaged")
        names.add(weight.name)
    rest = sorted(name for name in files.headers if name not in claimed and _looks_quantized(files, name))
    if rest:
        shown = ", ".join(f"{name} ({str(files.headers[name].dtype).removeprefix('torch.')})" for name in rest[:3])
        raise CheckpointError(
            f"{files.path} is in {family}, and {len(rest)} of its tensors look quantized in another way: {shown}\n"
            "  its config belongs to another file, or the format is one that cannot be read"
        )


def _looks_quantized(files: CheckpointFiles, name: str) -> bool:
    if name.endswith(_NO_WEIGHTS):
        return False
    if name.endswith(_STACKED_SCALES):
        return True
    parts = name.split(".")
    suffixes = (".".join(parts[-count:]) for count in range(1, min(3, len(parts) - 1) + 1))
    return files.headers[name].dtype in _CODES or any(suffix in _SIGNS for suffix in suffixes)
