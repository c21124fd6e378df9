"""What the ops' arguments must be. Graphs come from anywhere, and the planes in them from files."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxquant.activation_codecs import CODE_DTYPES
from fxquant.errors import ModelError, SchemeError
from fxquant.scheme import Activation, Scheme
from fxquant.scheme.activations import parse_activation


def check_biases(biases: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Raise ModelError unless there are no biases, or one for each weight, `[N]` or empty."""
    one_each = len(biases) == len(rows) and all(b.shape in ((n,), (0,)) for b, n in zip(biases, rows, strict=True))
    if biases and not one_each:
        raise ModelError(
            "biases are not those of their weights: there may be none, or for each one of N numbers or of 0\n"
            f"  shapes: {[tuple(bias.shape) for bias in biases]}\n  N: {list(rows)}"
        )


def refuse_tangents(inputs: Iterable[Tensor]) -> None:
    """Raise ModelError where forward-mode derivatives are wanted: ops have none, and torch would give zeros.

    For modules, of all that an op differentiates, before they call it: behind that tangents are gone.
    """
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise ModelError(
            "quantized modules have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)\n"
            "  gradients backwards are there, and all derivatives after fxquant.dequantize(model)"
        )


def planes_by_weight(planes: Sequence[Tensor], rows: Sequence[int], spelling: str, k: int) -> list[dict[str, Tensor]]:
    """The planes of each weight by name.

    Raises:
        ModelError: their shapes are not what the scheme demands, or k does not consist of the groups of its activation.
    """
    scheme, parts = Scheme.parse(spelling), []
    if scheme.activation:
        _check_group(scheme.activation, k)
    per_weight = len(planes) // max(len(rows), 1)
    for i, n in enumerate(rows):
        own, (names, wanted) = planes[i * per_weight : (i + 1) * per_weight], _wanted(spelling, int(n), int(k))
        if [plane.shape for plane in own] != wanted:
            raise ModelError(
                f"fxquant::linear got planes that are not {spelling} of an [N={n}, K={k}] weight, K being the input's "
                f"last dimension\n  shapes: {[tuple(plane.shape) for plane in own]}\n"
                f"  expected: {wanted} ({', '.join(names)})"
            )
        parts.append(dict(zip(names, own, strict=True)))
    return parts


@functools.lru_cache(maxsize=1024)
def _wanted(spelling: str, n: int, k: int) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Names and shapes of the planes of one weight."""
    specs = Scheme.parse(spelling).planes(n, k)
    return tuple(specs), [spec.shape for spec in specs.values()]


def checked_activation(spelling: str, k: int, input_scale: Tensor | None) -> Activation:
    """The activation that is spelled, for an input of k features.

    Raises:
        SchemeError: there is no such activation.
        ModelError: k does not consist of whole groups, or there is an input scale where none is wanted, or none.
    """
    found = parse_activation(spelling)
    if found is None:
        raise SchemeError(f"fxquant::quantize_activation: no activation is called {spelling!r}")
    _check_group(found, k)
    shape = None if input_scale is None else list(input_scale.shape)
    if shape != ([1] if found.static else None):
        wanted = "an input scale of shape [1]" if found.static else "no input scale"
        got = "none" if shape is None else f"one of shape {shape}"
        raise ModelError(f"fxquant::quantize_activation: {spelling} takes {wanted}, got {got}")
    return found


def _check_group(activation: Activation, k: int) -> None:
    if activation.group and k % activation.group:
        raise ModelError(f"an input of K={k} features does not consist of the groups of {activation} activations")


def scales_shape(activation: Activation, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of an input of this shape."""
    if activation.static:
        return (1,)
    return (*shape[:-1], shape[-1] // activation.group if activation.group else 1)


def check_codes(x: Tensor, codes: Tensor, scales: Tensor, spelling: str) -> None:
    """Raise ModelError where codes and scales are not those of x under the scheme's activation."""
    activation = Scheme.parse(spelling).activation
    if activation is None:
        raise ModelError(f"fxquant::linear_on_codes: {spelling} takes its input as it is, not as codes")
    wanted = (tuple(x.shape), CODE_DTYPES[activation.element], scales_shape(activation, x.shape), torch.float32)
    found = (tuple(codes.shape), codes.dtype, tuple(scales.shape), scales.dtype)
    if found != wanted:
        raise ModelError(
            f"fxquant::linear_on_codes got codes and scales that are not {activation} of an input {list(x.shape)}\n"
            f"  got: {found}\n  expected: {wanted}"
        )
