"""In which scheme each matrix of a checkpoint is written to a GGUF file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from fxquant.checkpoint_contents import Fit, Matrix
from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.gguf.models import gguf_architecture
from fxquant.gguf.types import gguf_type
from fxquant.scheme import FLOAT_SCALES, Scheme

# Of two that take as many bits, the one that adds less error to weights that were quantized once already.
_BY_BITS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        1: ("q2_k", "q4_0"),
        2: ("q2_k", "q4_0"),
        3: ("q3_k", "q4_0"),
        4: ("q4_k", "q4_0"),
        5: ("q5_k", "q5_1"),
        6: ("q6_k", "q8_0"),
    }
)
"""Where there is no type for a scheme: of blocks of 256, and of 32; by the bits of a weight. More bits: q8_0."""
_TABLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"nf4": ("iq4_xs", "iq4_nl"), "fp4": ("q4_k", "iq4_nl"), "e2m1": ("q4_k", "iq4_nl")}
)
"""The same for elements whose values are not evenly spaced."""
_FLOATS = ("q8_0", "q8_0")
_SMALLEST = 32


def gguf_fit(matrices: Mapping[str, Matrix], model_type: str = "") -> dict[str, Fit]:
    """Which scheme each matrix is written in: its own where GGUF has a type that holds it, else the nearest.

    The matrices of one projection of all experts of a layer stand in one tensor, which has one type.

    Args:
        matrices: all of a checkpoint, by any names.
        model_type: of the config: llama.cpp has all of NVFP4 for some. Empty: taken for one of the others.

    Returns:
        By the same names. Schemes that `fxquant.gguf.gguf_type` has types for, or None: in full precision.

    Raises:
        FileError: models of this type are not written.
    """
    nvfp4 = bool(model_type) and gguf_architecture(model_type)[1].nvfp4
    fits = {key: _fit(matrix, nvfp4=nvfp4) for key, matrix in matrices.items()}
    stacks: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for key, matrix in matrices.items():
        if place := expert_place(matrix.own):
            stacks[place[0], place[2]][place[1]] = key
    most = max(map(len, stacks.values()), default=0)
    for (owner, projection), keys in stacks.items():
        fits |= _together(f"{owner}.*.{projection}", {key: fits[key] for key in keys.values()}, most)
    return fits


def expert_place(own: str) -> tuple[str, str, str] | None:
    """Module, number and projection of a matrix of an expert, from its name in the model; None: it is none."""
    found = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", own)
    return None if found is None else (found[1], found[2], found[3])


def _fit(matrix: Matrix, *, nvfp4: bool) -> Fit:
    scheme, k = matrix.scheme, matrix.k
    if matrix.n == 1:
        return Fit(None, "a matrix of one row is a vector in GGUF, and vectors are not quantized")
    if k % _SMALLEST:
        return Fit(None, f"K={k} is no multiple of {_SMALLEST}, and GGUF has no smaller blocks")
    why = f"GGUF has no type for {scheme.weight_only}"
    if gguf_type(scheme) == "NVFP4" and not nvfp4:
        why = "llama.cpp leaves out the second level of NVFP4's scales in models of this type"
    elif _holds(scheme, k):
        if scheme.activation is None:
            return Fit(scheme)
        return Fit(scheme.weight_only, "a GGUF file does not say how activations are quantized")
    for near in _near(scheme):
        if _holds(near, k):
            return Fit(near, f"{why}; the nearest is {near}")
    raise AssertionError("q8_0 holds any matrix of such K")


def _holds(scheme: Scheme, k: int) -> bool:
    name = gguf_type(scheme)
    return name is not None and k % LAYOUTS[name].size == 0


def _near(scheme: Scheme) -> Iterable[Scheme]:
    """Schemes like one that GGUF has no type for, the most alike first."""
    spec, weight = scheme.spec, scheme.weight_only
    if weight.outer is None and not weight.double and weight.scale in FLOAT_SCALES:
        # the same codes but for ties: only scales are rounded
        if weight.zero == "none":
            yield replace(weight, scale="fp16")
        elif spec.kind == "int":
            yield replace(weight, element=f"uint{spec.bits}", zero="bias", scale="fp16")
    names = _TABLES.get(scheme.element)
    if names is None:
        bits = spec.bits if spec.vectors is None else round(weight.bits_per_weight())
        names = _BY_BITS.get(max(bits, 1), _FLOATS)
    yield from map(Scheme.parse, (*names, "q8_0"))


def _together(name: str, fits: Mapping[str, Fit], most: int) -> dict[str, Fit]:
    """What the matrices of one tensor get: all the type that takes the most bits, or all none."""
    if len(fits) < most:
        why = f"{name} stand in one tensor of GGUF, and only {len(fits)} of {most} are quantized"
        return {key: Fit(None, why) for key in fits}
    schemes = {fit.scheme for fit in fits.values() if fit.scheme is not None}
    if len({gguf_type(scheme) for scheme in schemes}) < 2:
        return dict(fits)
    largest = max(schemes, key=_bits)
    why = f"{name} stand in one tensor of GGUF, and some of them are written in {largest}"
    return {key: fit if fit.scheme == largest else Fit(largest, why) for key, fit in fits.items()}


def _bits(scheme: Scheme) -> float:
    layout = LAYOUTS[gguf_type(scheme) or ""]
    return layout.nbytes / layout.size
