"""Planes of one scheme as planes of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.bits import unpack
from fxquant.codecs import dequantize, quantize, squared_error
from fxquant.errors import SchemeError
from fxquant.scheme import FLOAT_SCALES, Scheme

_ROUNDED = 1e-5
"""More than that, and a scale was too large or too small for its new dtype, or a search finds a better one."""


def is_exact(scheme: Scheme, to: Scheme) -> bool:
    """Whether the planes of one scheme are planes of the other: they may differ in what is done to inputs alone."""
    static = to.activation is not None and to.activation.static
    return scheme == to or (not static and replace(scheme, activation=to.activation) == to)


def recoded(
    planes: Mapping[str, Tensor], scheme: Scheme, to: Scheme, n: int, k: int
) -> tuple[dict[str, Tensor], float | None]:
    """The planes of a weight under another scheme.

    Where nothing but the dtype of scales differs, codes stay and scales are rounded; so they do where integer zeros
    become biases. Else the weight is decoded, in float32, and quantized again.

    Args:
        planes: of `scheme`.
        scheme: what they were made under.
        to: another one, that can hold `[n, k]`.
        n: rows of the weight.
        k: its columns.

    Returns:
        Planes of `to`, and the relative squared error that was added; None where they are the same weight exactly.

    Raises:
        SchemeError: `to` cannot be made of a weight alone.
    """
    if is_exact(scheme, to):
        return {name: planes[name] for name in to.planes(n, k)}, None
    weight = dequantize(planes, scheme, n, k)
    specs = to.planes(n, k)
    kept = dict(planes)
    if to.zero == "bias" and _same_codes(_biased(scheme), to):
        scheme, kept = _biased(scheme), _with_biases(planes, scheme, n, k) if scheme.zero == "int" else kept
    if _same_codes(scheme, to) and specs.keys() <= kept.keys():
        made = {name: kept[name].to(spec.dtype) for name, spec in specs.items()}
        error = squared_error(weight, made, to)
        if error < _ROUNDED:
            return made, error or None
    made = quantize(weight, to)
    return made, squared_error(weight, made, to) or None


def _biased(scheme: Scheme) -> Scheme:
    """With biases in the place of integer zeros of unsigned codes."""
    unsigned = scheme.spec.kind == "int" and scheme.spec.low == 0
    plain = scheme.outer is None and not scheme.double and not scheme.block.flat and scheme.scale in FLOAT_SCALES
    return replace(scheme, zero="bias") if scheme.zero == "int" and unsigned and plain else scheme


def _with_biases(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int) -> dict[str, Tensor]:
    zeros, spec = planes["zeros"], scheme.spec
    if spec.dtype is None:
        zeros = unpack(zeros, spec.bits, scheme.block.grid(n, k)[-1])
    return {**planes, "biases": -(zeros.to(torch.float32) * planes["scales"].to(torch.float32))}


def _same_codes(scheme: Scheme, to: Scheme) -> bool:
    """Whether nothing differs but the dtype of scales, and what is done to inputs."""
    try:
        return replace(scheme, scale=to.scale, activation=to.activation) == to
    except SchemeError:
        return False
