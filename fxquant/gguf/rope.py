"""The rotary embeddings of a model from what a GGUF file says about them, and from the tensors that stand for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FileError
from fxquant.gguf.files import GgufFile, shortest

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models of llama 3 have; files hold what comes of it."""


def rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of a config; empty where the file says nothing, and its config class knows.

    Raises:
        FileError: of a kind that transformers does not have, or that cannot be told from its factors.
    """
    base = rope_base(file, "rope.freq_base")
    found: dict[str, Any] = {} if base is None else {"rope_type": "default", "rope_theta": base}
    rotary = file.value("rope.dimension_count")
    if type(rotary) is int and 0 < rotary < head_dim:
        found["partial_rotary_factor"] = rotary / head_dim
    if "rope_factors_long.weight" in file.headers:
        scaling = _longrope(file)
    elif "rope_freqs.weight" in file.headers:
        scaling = _llama3(file, base or 10000.0)
    else:
        scaling = _scaling(file)
    return {"rope_type": "default", "rope_theta": 10000.0, **found, **scaling} if found or scaling else {}


def rope_base(file: GgufFile, key: str) -> float | None:
    """The base of the wavelengths; None where the file does not say.

    Raises:
        FileError: it is no positive number.
    """
    found = file.value(key)
    if found is not None and not (isinstance(found, float) and found > 0):
        raise FileError(f"{file.path}: {file.architecture}.{key} is {found!r}; it has to be a positive number")
    return found


def _scaling(file: GgufFile) -> dict[str, Any]:
    kind, factor = file.value("rope.scaling.type"), file.value("rope.scaling.factor")
    if kind in (None, "none") or (kind == "linear" and not factor):
        return {}
    if kind not in ("linear", "yarn") or not isinstance(factor, float):
        raise FileError(f"{file.path} scales rotary embeddings by {kind!r}, factor {factor!r}, which is not known")
    found = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = _original(file)
        values = {name: file.value(f"rope.scaling.{key}") for key, name in _YARN.items()}
        found |= {name: value for name, value in values.items() if isinstance(value, float)}
    return found


def _longrope(file: GgufFile) -> dict[str, Any]:
    long, short = (_vector(file, f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    return {
        "rope_type": "longrope",
        "long_factor": [shortest(one) for one in long.tolist()],
        "short_factor": [shortest(one) for one in short.tolist()],
        "original_max_position_embeddings": _original(file),
    }


def _llama3(file: GgufFile, base: float) -> dict[str, Any]:
    """The settings that the factors in `rope_freqs.weight` come of: all but one are the same in all models."""
    stored = _vector(file, "rope_freqs.weight")
    rotary = 2 * len(stored)
    factor = float(stored.max())
    found = {"rope_type": "llama3", "factor": shortest(factor), **_LLAMA3}
    wavelengths = 2 * math.pi * base ** (torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not torch.allclose(stored.double(), expected, rtol=1e-3):
        raise FileError(
            f"{file.path}: the factors of its rotary embeddings, rope_freqs.weight, are not those of llama 3\n"
            "  put the config.json of the original model beside it"
        )
    return found


def _vector(file: GgufFile, name: str) -> Tensor:
    header = file.headers.get(name)
    if header is None or header.type_name != "F32" or len(header.shape) != 1 or header.nbytes > 1 << 20:
        raise FileError(f"{file.path}: {name} has to be a vector of F32; it is {header}")
    found = file.tensor(name)
    if not bool(found.isfinite().all()) or not bool((found > 0).all()):
        raise FileError(f"{file.path}: {name} has to be positive and finite")
    return found


def _original(file: GgufFile) -> int:
    found = file.value("rope.scaling.original_context_length")
    if type(found) is not int or found < 1:
        raise FileError(f"{file.path} scales rotary embeddings from a context of {found!r}, which has to be a number")
    return found
