"""Which tensors of a GGUF file are which of a transformers model: by the table of names of the package gguf."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.errors import FileError, nearest
from fxquant.gguf.files import GgufFile

SCALES = (".scale", ".input_scale")
"""Ends of names of tensors that belong to a weight of the same name in NVFP4."""
_OF_CONFIG = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are settings in transformers' configs."""
_HEAD = "lm_head.weight"
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Match:
    """Which tensors make up one of a model."""

    name: str
    """Of the parameter of the model, `model.layers.0.mlp.experts.gate_up_proj`."""
    tensors: tuple[str, ...]
    """Of the file: one, or the gate's and the up's."""


def match_names(file: GgufFile, names: Iterable[str]) -> list[Match]:
    """Which tensors of a file make up each of a model.

    Args:
        file: of an architecture that gguf has names for.
        names: of all parameters of the model. One that is left out of the result is the output matrix of a model that
            ties it to its embeddings.

    Raises:
        FileError: tensors of the model are not in the file, or tensors of the file not in the model.
    """
    names = list(names)
    table = _table(file.architecture, names)
    matches, missing = [], []
    for name in names:
        options = list(_options(table, name))
        found = next((option for option in options if all(t in file.headers for t in option)), None)
        if found is not None:
            matches.append(Match(name, found))
        elif name != _HEAD or "output.weight" in file.headers:
            missing.append(name)
    _refuse(file, "lacks tensors of the model", missing)
    used = {tensor for match in matches for tensor in match.tensors}
    scales = {tensor.removesuffix(".weight") + scale: tensor for tensor in used for scale in SCALES}
    unscaled = [name for name, of in scales.items() if name in file.headers and file.headers[of].type_name != "NVFP4"]
    _refuse(file, "holds scales of weights that are not NVFP4", unscaled)
    used |= scales.keys()
    _refuse(file, "holds tensors that the model does not have", file.headers.keys() - used - _OF_CONFIG)
    return matches


def _refuse(file: GgufFile, fault: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = ", ..." if len(found) > 5 else ""
        raise FileError(f"{file.path}, of {file.architecture}, {fault}: {len(found)}\n  {', '.join(found[:5])}{more}")


def written_names(architecture: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What a file calls each parameter of a model that it is to hold: one tensor, or the gate's and the up's.

    Args:
        architecture: as llama.cpp calls it.
        names: of parameters; of stacked experts also of one projection: `model.layers.0.mlp.experts.gate_proj`.

    Raises:
        FileError: gguf has no name for one of them.
    """
    names = list(names)
    table = _table(architecture, names)
    found = {name: next(_options(table, name), ()) for name in names}
    unknown = sorted(name for name, tensors in found.items() if not tensors)
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        raise FileError(
            f"GGUF files of {architecture} have no place for {len(unknown)} tensors of the model\n"
            f"  {', '.join(unknown[:5])}{more}"
        )
    return found


def _table(architecture: str, names: Iterable[str]) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise FileError(f"gguf does not know the architecture {architecture!r}{nearest(architecture, known)}")
    # the layers of the model, not those that the file says it has: they may be 2^32
    layers = max((int(n) for name in names for n in re.findall(r"\.(\d+)\.", name)), default=0) + 1
    return get_tensor_name_map(known[architecture], layers)


def _options(table: Any, name: str) -> Iterator[tuple[str, ...]]:
    """Ways in which files have a parameter, `.weight` and `.bias` included."""
    base, suffix = _split(name)
    whole = table.get_name(base)
    if whole is not None:
        yield (whole + suffix,)
    owner, _, leaf = base.rpartition(".")
    parts = [table.get_name(f"{owner}.{part}") for part in _EXPERT_PARTS.get(leaf, ())]
    if parts and None not in parts:
        yield tuple(part + suffix for part in parts)
        yield (parts[0].replace("ffn_gate_", "ffn_gate_up_") + suffix,)


def _split(name: str) -> tuple[str, str]:
    """`a.b.weight`, `a.b` and `a.b_bias` as a module and the end that GGUF gives to the name of its tensor."""
    for end, suffix in ((".weight", ".weight"), (".bias", ".bias"), ("_bias", ".bias")):
        if name.endswith(end):
            return name.removesuffix(end), suffix
    return name, ".weight"


def is_experts(tensor: str) -> bool:
    """Whether a tensor of this name stacks the matrices of all experts."""
    return tensor.removesuffix(".weight").endswith("_exps")


def has_experts(headers: Mapping[str, object]) -> bool:
    """Whether any of these tensors stacks matrices of experts."""
    return any(is_experts(name) for name in headers)
