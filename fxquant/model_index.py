"""`fxquant.json`: what a directory of a quantized model says about itself, read as if an enemy had written it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.errors import FileError, ModelError, SchemeError
from fxquant.model_tensors import FLOATS
from fxquant.modules import QLinear
from fxquant.scheme import Scheme

FORMAT = 1
INDEX = "fxquant.json"
_INDEX_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Index:
    """The content of `fxquant.json`, checked for types but not yet against a model."""

    model: str
    """Name of the model's class in transformers."""
    recipe: str
    linears: Mapping[str, tuple[Scheme, torch.dtype]]
    """Scheme and dtype of `.weight` of every quantized linear, by FQN."""
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
    try:
        if file.stat().st_size > _INDEX_LIMIT:
            raise FileError(f"{file} has {file.stat().st_size} bytes: no index is that large")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} is not a model that fxquant wrote: {INDEX}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not valid JSON: {error}") from None
    return index_from(data, str(file))


def index_from(data: Any, source: str) -> Index:
    """The index that parsed JSON describes.

    Raises:
        FileError: it is not what a reader of this version understands.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise FileError(f"{source} has the format {found!r}; this version of fxquant reads format {FORMAT}")
    linears, shared = _mapping(source, data, "linears"), _mapping(source, data, "shared")
    for name, other in shared.items():
        if not isinstance(other, str):
            raise FileError(f"{source}: shared tensor {name!r} must name another tensor, got {other!r}")
    return Index(
        model=str(data.get("model", "")),
        recipe=str(data.get("recipe", "")),
        linears={name: _entry(source, name, entry) for name, entry in linears.items()},
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
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QLinear)}
    if not linears:
        raise ModelError(f"nothing in this {kind} is quantized: write it with model.save_pretrained(path)")
    dtypes = {dtype: name for name, dtype in FLOATS.items()}
    return {
        "format": FORMAT,
        "model": kind,
        "recipe": recipe,
        "shared": {},
        "linears": {name: {"scheme": m.spelling, "dtype": dtypes[m.dtype]} for name, m in linears.items()},
    }


def _mapping(source: str, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    if not isinstance(found, dict):
        raise FileError(f"{source}: {key!r} must be an object, got {type(found).__name__}")
    return found


def _entry(source: str, name: str, entry: Any) -> tuple[Scheme, torch.dtype]:
    spelling, dtype = (entry.get("scheme"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    if not isinstance(spelling, str) or not isinstance(dtype, str) or dtype not in FLOATS:
        raise FileError(f"{source}: {name!r} needs a scheme and a dtype ({', '.join(FLOATS)}), got {entry!r}")
    try:
        return Scheme.parse(spelling), FLOATS[dtype]
    except SchemeError as error:
        raise FileError(f"{source}: {name!r}: {error}") from None
