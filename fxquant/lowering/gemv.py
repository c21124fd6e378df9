"""One row times a weight, out of Inductor's own operations: a reduction that fuses with what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import lowered, once_for, sorted_by_remainder
from fxquant.lowering.formats import Format
from fxquant.lowering.values import aten, cast, decoded_codes, high_half, low_half, offsets, scales, table


def gemv(x: Any, planes: Sequence[Any], form: Format, n: int, k: int) -> Any:
    """`W @ x` for an x of k numbers, the value of a node: float32 `[n]`. Every byte of the codes is read once."""
    groups, width = k // form.group, form.group // form.per_byte
    lanes = lowered(aten.view, by_field(x, form, k), [form.per_byte, groups, width])
    return row_products([lowered(aten.select, lanes, 0, i) for i in range(form.per_byte)], planes, form, n, k)


def row_products(inputs: Sequence[Any], planes: Sequence[Any], form: Format, n: int, k: int) -> Any:
    """Of each row of a weight the product with its input: float32 `[n]`.

    Args:
        inputs: for each field of a byte, the numbers that its columns are multiplied with, `[groups, width]` for all
            rows or `[n, groups, width]`.
        planes: as `Scheme.planes` orders them.
        form: how to read the planes.
        n: rows.
        k: columns.
    """
    inputs = [cast(part, torch.float32) for part in inputs]
    stored = lowered(aten.view, planes[0], [n, k // form.group, form.group // form.per_byte])
    fields = [low_half(stored), high_half(stored)] if form.per_byte == 2 else [stored]
    found, offset, scale = table(form, stored), offsets(planes, form, n, k), scales(planes[1], form, n, k)
    values = [decoded_codes(part, form, found) for part in fields]
    if offset is not None and form.zero != "bias":
        values = [lowered(aten.sub, value, lowered(aten.unsqueeze, offset, 2)) for value in values]
    terms = _sum(lowered(aten.mul, value, part) for value, part in zip(values, inputs, strict=True))
    terms = lowered(aten.mul, terms, lowered(aten.unsqueeze, scale, 2))
    if form.zero == "bias":
        shift = lowered(aten.mul, lowered(aten.unsqueeze, offset, 2), _sum(inputs))
        terms = lowered(aten.add, terms, shift)
    return lowered(aten.sum, terms, [1, 2])


def by_field(x: Any, form: Format, numbers: int) -> Any:
    """The input in memory, or every program would compute it again; columns of one field next to each other.

    In their own order, the columns that belong to the low halves of bytes are every second one: a GPU would read them
    number by number, where it reads neighbours sixteen bytes at a time. What computes x stores it in this order.
    """

    def make() -> Any:
        if form.per_byte == 1:
            x.realize()
            return x
        return sorted_by_remainder(lowered(aten.view, x, [numbers]), numbers, form.per_byte)

    return once_for(x, form.per_byte, make)


def _sum(values: Any) -> Any:
    first, *rest = values
    for value in rest:
        first = lowered(aten.add, first, value)
    return first
