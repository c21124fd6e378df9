"""One row times a weight, out of Inductor's own operations: a reduction that fuses with what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import lowered, once_for, row_sums, sorted_by_remainder
from fxquant.lowering.decoded import values
from fxquant.lowering.formats import Format
from fxquant.lowering.values import Weights, aten, cast, decoded_codes, table, unit_fields

_PARTS, _LEAST = (4, 2, 1), 1024
"""Rows of bytes are cut into so many parts, of so many columns at least: a thread reads all of them at a time."""


def gemv(x: Any, weight: Weights) -> Any:
    """`W @ x` for an x of k numbers, the value of a node: float32 `[n]`."""
    form, k = weight.form, weight.k
    if not form.in_units or form.bits == 8:
        x.realize()
        parts = next((c for c in _PARTS if k % c == 0 and k // c >= _LEAST), 1) if form.in_units else 1
        row = cast(lowered(aten.view, x, [1, parts, k // parts]), torch.float32)
        terms = lowered(aten.mul, lowered(aten.view, values(weight), [weight.n, parts, k // parts]), row)
        return row_sums(_sum(lowered(aten.select, terms, 1, i) for i in range(parts)))
    lanes = lowered(aten.view, by_place(x, form, k), [form.per_unit, k // form.group, form.group // form.per_unit])
    inputs = [lowered(aten.select, lanes, 0, i) for i in range(form.per_unit)]
    offsets = weight.offsets()
    codes, scales = (lowered(aten.squeeze, part, 0) for part in (weight.codes, weight.scales()))
    return row_products(inputs, codes, scales, None if offsets is None else lowered(aten.squeeze, offsets, 0), form)


def row_products(inputs: Sequence[Any], codes: Any, scales: Any, offsets: Any | None, form: Format) -> Any:
    """Of each row of a weight the product with its input: float32 `[n]`.

    Args:
        inputs: for each code of a unit, the numbers that its columns are multiplied with, `[groups, units]` for all
            rows or `[n, groups, units]`.
        codes: `[n, bytes]`.
        scales: float32 `[n, groups]`.
        offsets: zeros or biases, float32 `[n, groups]`, or None.
        form: what codes stand for. It is one of units.
    """
    inputs = [cast(part, torch.float32) for part in inputs]
    found, groups = table(form, codes), int(scales.get_size()[1])
    numbers = [decoded_codes(part, form, found) for part in unit_fields(codes, form, groups)]
    if offsets is not None:
        offsets = lowered(aten.unsqueeze, offsets, 2)
    if offsets is not None and form.zero != "bias":
        numbers = [lowered(aten.sub, number, offsets) for number in numbers]
    terms = _sum(lowered(aten.mul, number, part) for number, part in zip(numbers, inputs, strict=True))
    terms = lowered(aten.mul, terms, lowered(aten.unsqueeze, scales, 2))
    if form.zero == "bias":
        terms = lowered(aten.add, terms, lowered(aten.mul, offsets, _sum(inputs)))
    return row_sums(terms)


def by_place(x: Any, form: Format, numbers: int) -> Any:
    """The input in memory, or every program would compute it again; first what the first codes of units multiply.

    In their own order, the columns that belong to the low halves of bytes, say, are every second one: a GPU would read
    them number by number, where it reads neighbours sixteen bytes at a time. What computes x stores it in this order.
    """

    def make() -> Any:
        if form.per_unit == 1:
            x.realize()
            return x
        return sorted_by_remainder(lowered(aten.view, x, [numbers]), numbers, form.per_unit)

    return once_for(x, form.per_unit, make)


def _sum(values: Any) -> Any:
    first, *rest = values
    for value in rest:
        first = lowered(aten.add, first, value)
    return first
