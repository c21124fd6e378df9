"""`fxquant::linear` as Inductor compiles it: by kernels of our own where there are some, else by the op as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import add_lowering, as_it_is, is_size, likely_size, lowered, once_for, side_by_side
from fxquant.lowering.activations import by_row, coded, decoded, encoded, encodes, numbers
from fxquant.lowering.decoded import decoded_weight, in_order, product
from fxquant.lowering.dispatch import CODE_MULTIPLES, CODE_ROWS, UNKNOWN_ROWS, WAYS, kind_of, ways
from fxquant.lowering.formats import format_of
from fxquant.lowering.gemv import gemv
from fxquant.lowering.tiles import Scaled, tiled
from fxquant.lowering.values import Weights, aten, cast
from fxquant.scheme import Activation, Scheme
from fxquant.scheme.activations import parse_activation

_FLOAT = torch.float32


def register() -> None:
    """Give Inductor the lowerings, if Inductor has been imported. Traces call this, so that nobody else needs to."""
    add_lowering(torch.ops.fxquant.linear.default, lower)
    add_lowering(torch.ops.fxquant.quantize_activation.default, lower_activation)
    add_lowering(torch.ops.fxquant.linear_on_codes.default, lower_on_codes)


def lower(x: Any, planes: Sequence[Any], biases: Sequence[Any], scheme: str, rows: Sequence[int], abi: int) -> Any:
    """Inductor's value of `fxquant::linear(x, planes, biases, scheme, rows, abi)`."""
    outputs = _outputs(x, None, planes, biases, scheme, rows)
    if outputs is None:
        return as_it_is(torch.ops.fxquant.linear.default, x, planes, biases, scheme, rows, abi)
    return outputs[0] if len(outputs) == 1 else side_by_side(outputs)


def lower_activation(x: Any, activation: str, input_scale: Any | None, abi: int) -> Any:
    """Inductor's values of `fxquant::quantize_activation(x, activation, input_scale, abi)`."""
    found = parse_activation(activation)
    if found is None or not encodes(x, found):
        return as_it_is(torch.ops.fxquant.quantize_activation.default, x, activation, input_scale, abi)
    return encoded(x, found, input_scale)


def lower_on_codes(
    x: Any,
    codes: Any,
    scales: Any,
    planes: Sequence[Any],
    biases: Sequence[Any],
    scheme: str,
    rows: Sequence[int],
    abi: int,
) -> Any:
    """Inductor's value of `fxquant::linear_on_codes` with these arguments."""
    outputs = _outputs(x, (codes, scales), planes, biases, scheme, rows)
    if outputs is None:
        op = torch.ops.fxquant.linear_on_codes.default
        return as_it_is(op, x, codes, scales, planes, biases, scheme, rows, abi)
    return outputs[0] if len(outputs) == 1 else side_by_side(outputs)


def _outputs(
    x: Any,
    given: tuple[Any, Any] | None,
    planes: Sequence[Any],
    biases: Sequence[Any],
    spelling: str,
    rows: Sequence[int],
) -> list[Any] | None:
    """The result of every weight; None where one of them has no kernel."""
    *batch, k = x.get_size()
    m = math.prod(batch)
    static = all(isinstance(n, int) for n in rows) and str(k).isdigit()
    if not static or is_size(m, 0) or kind_of(x.get_device()) not in WAYS:
        return None
    scheme, k = Scheme.parse(spelling), int(k)
    activation = scheme.activation
    if activation is not None and not encodes(x, activation):
        return None
    likely = 1 if is_size(m, 1) else max(likely_size(m, UNKNOWN_ROWS), 2)
    outputs = []
    for i, (own, n) in enumerate(zip(_by_weight(planes, len(rows)), rows, strict=True)):
        form = format_of(scheme, n, k)
        if form is None:
            return None
        names = scheme.planes(n, k)
        weight = Weights(dict(zip(names, own, strict=True)), scheme, form, n, k)
        if activation is None:
            y = _product(x, weight, _bias(biases, i, x.get_dtype()), likely)
        else:
            bias = _bias(biases, i, None)
            pair = given or coded(x, activation, weight.planes.get("input_scale"))
            y = _product_of_codes(x, pair, weight, bias, activation, likely)
        if y is None:
            return None
        outputs.append(lowered(aten.view, y, [*batch, n]))
    return outputs or None


def _by_weight(planes: Sequence[Any], count: int) -> list[Sequence[Any]]:
    each = len(planes) // max(count, 1)
    return [planes[i * each : (i + 1) * each] for i in range(count)]


def _bias(biases: Sequence[Any], i: int, dtype: torch.dtype | None) -> Any | None:
    # As in the op: an empty tensor stands for "no bias".
    if not biases or is_size(biases[i].get_size()[0], 0):
        return None
    return cast(biases[i], dtype) if dtype else biases[i]


def _product(x: Any, weight: Weights, bias: Any | None, likely: int) -> Any | None:
    """`x @ W.T + bias` for x of rows of k numbers, the first way that can; None where none can."""
    x = in_order(x, weight.planes.get("perm"))
    matrix = lowered(aten.view, x, [-1, weight.k])
    for way in ways(x.get_device(), weight.form, x.get_dtype(), likely):
        if way == "gemv":
            return _of_one_row(x, weight, bias, x.get_dtype())
        if way == "tiles":
            y = tiled(matrix, weight, bias, likely)
            if y is not None:
                return y
        if way == "decoded":
            return product(matrix, decoded_weight(weight, x.get_dtype()), bias)
    return None


def _of_one_row(x: Any, weight: Weights, bias: Any | None, dtype: torch.dtype) -> Any:
    y = gemv(x, weight)
    return cast(y if bias is None else lowered(aten.add, y, cast(bias, _FLOAT)), dtype)


def _product_of_codes(
    x: Any, codes_and_scales: tuple[Any, Any], weight: Weights, bias: Any | None, activation: Activation, likely: int
) -> Any | None:
    """The same of codes: one row as float32, more as halves, which hold every code and are scaled behind the product.

    None where the library multiplies codes of both sides, and for weights that halves do not hold.
    """
    codes, scales = codes_and_scales
    form, dtype, perm = weight.form, x.get_dtype(), weight.planes.get("perm")
    if likely == 1:
        row, _ = once_for(codes, id(scales.data), lambda: (decoded(codes, scales, activation), scales.data))
        return _of_one_row(in_order(row, perm), weight, bias, dtype)
    multiple = CODE_MULTIPLES.get(weight.scheme.multiplied_codes or "", 0)
    of_library = multiple and weight.n % multiple == weight.k % multiple == 0
    if (of_library and likely > CODE_ROWS) or not form.exact(torch.bfloat16) or (perm is not None and activation.group):
        return None
    if "tiles" not in ways(x.get_device(), form, torch.bfloat16, min(likely, CODE_ROWS)):
        return None
    matrix = once_for(codes, torch.bfloat16, lambda: numbers(codes, torch.bfloat16))
    matrix = in_order(lowered(aten.view, matrix, [-1, weight.k]), perm)
    scaled = Scaled(by_row(scales, matrix.get_size()[0]), activation.group or weight.k, dtype)
    return tiled(matrix, weight, bias, likely, scaled)
