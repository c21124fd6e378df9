"""`fxquant.json`: what a directory of a quantized model says about itself, read as if an enemy had written it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint_files import read_json
from fxquant.errors import FileError, ModelError, SchemeError
from fxquant.expert_modules import QExperts
from fxquant.model_tensors import FLOATS
from fxquant.modules import QLinear
from fxquant.scheme import Scheme

FORMAT = 2
INDEX = "fxquant.json"


Schemes = Mapping[tuple[int | None, str], Scheme]
"""Expert, or None for all of them, and projection: the scheme."""


@dataclass(frozen=True)
class Index:
    """The content of `fxquant.json`, checked for types but not yet against a model."""

    model: str
    """Name of the model's class in transformers."""
    recipe: str
    linears: Mapping[str, tuple[Scheme, torch.dtype]]
    """Scheme and dtype of `.weight` of every quantized linear, by FQN."""
    experts: Mapping[str, tuple[Schemes, torch.dtype]]
    """Schemes and dtype of `weight_of` of every module of quantized experts, by FQN."""
    shared: Mapping[str, str]
    """Names of tensors that are another tensor under a second name."""
    source: str
    """Where it comes from, for errors."""


def read_index(path: str | os.PathLike[str]) -> Index:
    """The checked content of `fxquant.json`.

    Raises:
        FileError: it is missing, too large, no JSON, or not what a reader of this version understands.
    """
    file = Path(path) / INDEX
    if not file.is_file():
        raise FileError(f"{path} is not a model that fxquant wrote: it holds no {INDEX}")
    return index_from(read_json(file), str(file))


def index_from(data: Any, source: str) -> Index:
    """The index that parsed JSON describes.

    Raises:
        FileError: it is not what a reader of this version understands.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise FileError(f"{source} has the format {found!r}; this version of fxquant reads format {FORMAT}")
    linears, experts, shared = (_mapping(source, data, key) for key in ("linears", "experts", "shared"))
    for name, other in shared.items():
        if not isinstance(other, str):
            raise FileError(f"{source}: shared tensor {name!r} must name another tensor, got {other!r}")
    return Index(
        model=str(data.get("model", "")),
        recipe=str(data.get("recipe", "")),
        linears={name: _entry(source, name, entry) for name, entry in linears.items()},
        experts={name: _experts(source, name, entry) for name, entry in experts.items()},
        shared=shared,
        source=source,
    )


def index_of(model: nn.Module, recipe: str) -> dict[str, Any]:
    """The content of `fxquant.json` for a model, shared tensors left out.

    Raises:
        ModelError: the model is not quantized, or is no class of transformers.
    """
    import transformers

    kind = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or getattr(transformers, kind, None) is not type(model):
        raise ModelError(
            f"a {kind} cannot be built again from files: only models whose class is one of transformers' can\n"
            "  its tensors are in model.state_dict()"
        )
    modules = quantized_modules(model)
    if not any(modules.values()):
        raise ModelError(f"nothing in this {kind} is quantized: write it with model.save_pretrained(path)")
    return {"format": FORMAT, "model": kind, "recipe": recipe, "shared": {}, **modules}


def quantized_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The parts `linears` and `experts` of an index: schemes and dtype of all that is quantized, by FQN."""
    linears = {
        name: (m.scheme, m.dtype) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QLinear)
    }
    experts = {
        name: ({(e, p.name): scheme for e, p, scheme in m.matrices()}, m.dtype)
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, QExperts)
    }
    return index_parts(linears, experts)


def index_parts(
    linears: Mapping[str, tuple[Scheme, torch.dtype]],
    experts: Mapping[str, tuple[Mapping[tuple[int, str], Scheme | None], torch.dtype]],
) -> dict[str, dict[str, Any]]:
    """The parts `linears` and `experts` of an index.

    Args:
        linears: scheme and dtype of each quantized linear, by FQN.
        experts: of each module of experts the scheme of every matrix, by expert and projection, and the dtype.
    """
    dtypes = {dtype: name for name, dtype in FLOATS.items()}
    return {
        "linears": {name: {"scheme": str(scheme), "dtype": dtypes[dtype]} for name, (scheme, dtype) in linears.items()},
        "experts": {
            name: {"dtype": dtypes[dtype], "schemes": _by_projection(schemes)}
            for name, (schemes, dtype) in experts.items()
        },
    }


def _by_projection(schemes: Mapping[tuple[int, str], Scheme | None]) -> dict[str, dict[str, Any]]:
    """Of every projection the schemes, and which experts have each: their numbers, or "all"."""
    found: dict[str, dict[str, Any]] = {projection: {} for _, projection in schemes}
    for (e, projection), scheme in schemes.items():
        if scheme is not None:
            found[projection].setdefault(str(scheme), []).append(e)
    count = len({e for e, _ in schemes})
    return {name: {k: "all" if len(v) == count else v for k, v in by.items()} for name, by in found.items()}


def _mapping(source: str, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    if not isinstance(found, dict):
        raise FileError(f"{source}: {key!r} must be an object, got {type(found).__name__}")
    return found


def _entry(source: str, name: str, entry: Any) -> tuple[Scheme, torch.dtype]:
    spelling = entry.get("scheme") if isinstance(entry, dict) else None
    if not isinstance(spelling, str):
        raise FileError(f"{source}: {name!r} needs a scheme, got {entry!r}")
    return _scheme(source, name, spelling), _dtype(source, name, entry)


def _experts(source: str, name: str, entry: Any) -> tuple[Schemes, torch.dtype]:
    by_projection = entry.get("schemes") if isinstance(entry, dict) else None
    if not isinstance(by_projection, dict) or not all(isinstance(by, dict) for by in by_projection.values()):
        raise FileError(f"{source}: {name!r} needs schemes, an object for each projection, got {entry!r}")
    found: dict[tuple[int | None, str], Scheme] = {}
    for projection, by_scheme in by_projection.items():
        for spelling, members in by_scheme.items():
            if members != "all" and not (isinstance(members, list) and all(type(e) is int for e in members)):
                raise FileError(f"{source}: {name!r}: experts in {spelling} are numbers or 'all', got {members!r}")
            scheme = _scheme(source, name, spelling)
            for e in (None,) if members == "all" else members:
                if (e, projection) in found:
                    raise FileError(f"{source}: {name!r} has two schemes for {members}.{projection}")
                found[e, projection] = scheme
    return found, _dtype(source, name, entry)


def _dtype(source: str, name: str, entry: Mapping[str, Any]) -> torch.dtype:
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise FileError(f"{source}: {name!r} needs a dtype ({', '.join(FLOATS)}), got {dtype!r}")
    return FLOATS[dtype]


def _scheme(source: str, name: str, spelling: str) -> Scheme:
    try:
        return Scheme.parse(spelling)
    except SchemeError as error:
        raise FileError(f"{source}: {name!r}: {error}") from None
