"""`fxquant::linear` as Inductor compiles it: by kernels of our own where there are some, else by the op as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import add_lowering, as_it_is, is_size, likely_size, lowered, side_by_side
from fxquant.lowering.decoded import decoded_weight, in_order, product
from fxquant.lowering.dispatch import UNKNOWN_ROWS, WAYS, kind_of, ways
from fxquant.lowering.formats import format_of
from fxquant.lowering.gemv import gemv
from fxquant.lowering.tiles import tiled
from fxquant.lowering.values import Weights, aten, cast
from fxquant.scheme import Scheme


def register() -> None:
    """Give Inductor the lowering, if Inductor has been imported. Traces call this, so that nobody else needs to."""
    add_lowering(torch.ops.fxquant.linear.default, lower)


def lower(x: Any, planes: Sequence[Any], biases: Sequence[Any], scheme: str, rows: Sequence[int], abi: int) -> Any:
    """Inductor's value of `fxquant::linear(x, planes, biases, scheme, rows, abi)`."""
    outputs = _outputs(x, planes, biases, scheme, rows)
    if outputs is None:
        return as_it_is(torch.ops.fxquant.linear.default, x, planes, biases, scheme, rows, abi)
    return outputs[0] if len(outputs) == 1 else side_by_side(outputs)


def _outputs(
    x: Any, planes: Sequence[Any], biases: Sequence[Any], spelling: str, rows: Sequence[int]
) -> list[Any] | None:
    """The result of every weight; None where one of them has no kernel."""
    *batch, k = x.get_size()
    m = math.prod(batch)
    static = all(isinstance(n, int) for n in rows) and str(k).isdigit()
    if not static or is_size(m, 0) or kind_of(x.get_device()) not in WAYS:
        return None
    scheme, k = Scheme.parse(spelling), int(k)
    likely = 1 if is_size(m, 1) else max(likely_size(m, UNKNOWN_ROWS), 2)
    outputs = []
    for i, (own, n) in enumerate(zip(_by_weight(planes, len(rows)), rows, strict=True)):
        form = format_of(scheme, n, k)
        if form is None:
            return None
        names = scheme.planes(n, k)
        weight = Weights(dict(zip(names, own, strict=True)), scheme, form, n, k)
        y = _product(x, weight, _bias(biases, i, x.get_dtype()), likely)
        if y is None:
            return None
        outputs.append(lowered(aten.view, y, [*batch, n]))
    return outputs or None


def _by_weight(planes: Sequence[Any], count: int) -> list[Sequence[Any]]:
    each = len(planes) // max(count, 1)
    return [planes[i * each : (i + 1) * each] for i in range(count)]


def _bias(biases: Sequence[Any], i: int, dtype: torch.dtype) -> Any | None:
    # As in the op: an empty tensor stands for "no bias".
    return cast(biases[i], dtype) if biases and not is_size(biases[i].get_size()[0], 0) else None


def _product(x: Any, weight: Weights, bias: Any | None, likely: int) -> Any | None:
    """`x @ W.T + bias` for x of rows of k numbers, the first way that can; None where none can."""
    x = in_order(x, weight.planes.get("perm"))
    matrix = lowered(aten.view, x, [-1, weight.k])
    for way in ways(x.get_device(), weight.form, x.get_dtype(), likely):
        if way == "gemv":
            y = gemv(x, weight)
            y = y if bias is None else lowered(aten.add, y, cast(bias, torch.float32))
            return cast(y, x.get_dtype())
        if way == "tiles":
            y = tiled(matrix, weight, bias, likely)
            if y is not None:
                return y
        if way == "decoded":
            return product(matrix, decoded_weight(weight, x.get_dtype()), bias)
    return None
