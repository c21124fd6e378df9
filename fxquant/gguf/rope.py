"""The rotary embeddings of a model from what a GGUF file says about them, and from the tensors that stand for them.

And the way back: what a file says of the rotary embeddings of a config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FileError
from fxquant.gguf.files import GgufFile, shortest

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
_ALWAYS_READ = ("rope_type", "rope_theta", "partial_rotary_factor")
_READ: Mapping[str, tuple[str, ...]] = MappingProxyType({"default": (), "linear": ("factor",)})
"""Which parameters count, besides, by the kind; of other kinds: all."""
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
    expected = _llama3_factors({**found, "factor": factor, "rope_theta": base}, rotary)
    if not torch.allclose(stored.double(), expected, rtol=1e-3):
        raise FileError(
            f"{file.path}: the factors of its rotary embeddings, rope_freqs.weight, are not those of llama 3\n"
            "  put the config.json of the original model beside it"
        )
    return found


def _llama3_factors(parameters: Mapping[str, Any], rotary: int) -> Tensor:
    """By what llama 3 divides its frequencies: arXiv 2407.21783, and transformers' `_compute_llama3_parameters`."""
    exponents = torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** exponents
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1.0 - smooth) / parameters["factor"] + smooth)
    return factors


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


def rope_settings(config: Any, head_dim: int) -> dict[str, Any]:
    """What a file says of the rotary embeddings of a config, by keys without the architecture: `rope.freq_base`.

    Args:
        config: of transformers.
        head_dim: rows of q that one head has.

    Raises:
        FileError: of a kind that GGUF does not have.
    """
    rope = _parameters(config)
    if not rope:
        return {}
    kind = rope.get("rope_type", "default")
    found: dict[str, Any] = {"rope.dimension_count": int(head_dim * (rope.get("partial_rotary_factor") or 1.0))}
    if rope.get("rope_theta") is not None:
        found["rope.freq_base"] = float(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    if local.get("rope_theta") is not None:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": _number(rope, "factor")}
    if kind in ("yarn", "longrope"):
        found |= {"rope.scaling.type": kind, "rope.scaling.original_context_length": _original_of(config, rope)}
    if kind == "yarn":
        values = {f"rope.scaling.{key}": rope.get(name) for key, name in _YARN.items()}
        found |= {key: float(value) for key, value in values.items() if value is not None}
        if rope.get("attention_factor") is not None:
            # what llama.cpp multiplies the factor by that it computes itself, as transformers does by default
            found["rope.scaling.attn_factor"] = rope["attention_factor"] / (
                0.1 * math.log(_number(rope, "factor")) + 1.0
            )
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = _longrope_attention(config, rope)
    elif kind not in ("default", "linear", "yarn", "llama3"):
        raise FileError(f"GGUF has no rotary embeddings of the kind {kind!r}; it has linear, yarn, longrope, llama3")
    return found


def rope_tensors(config: Any, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a file that stand for settings of rotary embeddings: float32 `[rotary dimensions / 2]` each.

    Args:
        config: of transformers.
        head_dim: rows of q that one head has.

    Raises:
        FileError: the config has not as many factors as the rotary embeddings have frequencies.
    """
    rope = _parameters(config)
    rotary = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    if rope.get("rope_type") == "llama3":
        settings = {name: _number(rope, name) for name in ("rope_theta", "factor", *_LLAMA3)}
        return {"rope_freqs.weight": _llama3_factors(settings, rotary).to(torch.float32)}
    if rope.get("rope_type") != "longrope":
        return {}
    found = {f"rope_factors_{kind}.weight": list(rope.get(f"{kind}_factor") or ()) for kind in ("long", "short")}
    if any(len(factors) != rotary // 2 for factors in found.values()):
        sizes = ", ".join(str(len(factors)) for factors in found.values())
        raise FileError(f"the config has {sizes} factors for {rotary} rotary dimensions; {rotary // 2} are needed")
    return {name: torch.tensor(factors, dtype=torch.float32) for name, factors in found.items()}


def rope_notes(config: Any) -> tuple[str, ...]:
    """What readers of a file will not know of the rotary embeddings of a config: sentences for people."""
    rope = _parameters(config)
    notes = []
    betas = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    if rope.get("rope_type") == "yarn" and betas != (32.0, 1.0):
        notes.append(
            f"llama.cpp has 32 and 1 for the betas of YaRN in most models, and the config {betas[0]}, {betas[1]}"
        )
    if rope.get("rope_type") == "llama3" and any(rope.get(name) != value for name, value in _LLAMA3.items()):
        notes.append("fxquant needs the config.json beside the file: its rotary embeddings are not scaled as llama 3's")
    return tuple(notes)


def is_same_rotation(own: Any, again: Any) -> bool:
    """Whether `rope_parameters` of a config say the same as others, or nothing."""
    if not isinstance(own, dict) or not isinstance(again, dict):
        return own in (None, {})
    if all(isinstance(one, dict) for one in own.values()):
        return all(is_same_rotation(one, again.get(kind)) for kind, one in own.items())
    read = _READ.get(str(own.get("rope_type", "default")), tuple(own.keys() - {"type"}))
    mine, theirs = ({"partial_rotary_factor": 1.0, **one} for one in (own, again))
    names = [name for name in (*_ALWAYS_READ, *read) if mine.get(name) is not None]
    return all(mine[name] == theirs.get(name) for name in names)


def _parameters(config: Any) -> dict[str, Any]:
    """Of the layers that attend to everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found) or {}


def _number(rope: Mapping[str, Any], name: str) -> float:
    found = rope.get(name)
    if not isinstance(found, (int, float)) or not found > 0:
        raise FileError(f"the rotary embeddings of the config have {name} {found!r}; it has to be a positive number")
    return float(found)


def _original_of(config: Any, rope: Mapping[str, Any]) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def _longrope_attention(config: Any, rope: Mapping[str, Any]) -> float:
    """By what attention is scaled: LongRoPE, arXiv 2402.13753, as Phi-3 has it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original_of(config, rope)
    scale = config.max_position_embeddings / original
    return math.sqrt(1.0 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
