"""Weights decoded number by number: for products of the vendor's library, and for what is stored in no whole bytes."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.bits import TRITS_PER_BYTE
from fxquant.inductor import fields, gathered, indices, lowered, quotient, remainder
from fxquant.lowering.values import Weights, aten, cast, decoded_codes, known, looked_up, table
from fxquant.scheme import Vectors


def decoded_weight(weight: Weights, dtype: torch.dtype) -> Any:
    """The `[n, k]` weight in memory: computed in float32, rounded to `dtype`, as `fxquant.codecs.dequantize` does.

    Its columns are in the order of the planes.
    """
    result = cast(values(weight), dtype)
    result.realize()
    return result


def values(weight: Weights) -> Any:
    """The `[n, k]` weight in float32, computed where it is read; its columns are in the order of the planes."""
    form, n, k, planes = weight.form, weight.n, weight.k, weight.planes
    by_group = [n, k // form.group, form.group]
    found, offset = lowered(aten.view, _elements(weight), by_group), weight.offsets()
    if offset is not None:
        offset = lowered(aten.view, offset, [*by_group[:2], 1])
    if offset is not None and form.zero != "bias":
        found = lowered(aten.sub, found, offset)
    found = lowered(aten.mul, found, lowered(aten.view, weight.scales(), [*by_group[:2], 1]))
    if form.zero == "bias":
        found = lowered(aten.add, found, offset)
    found = lowered(aten.view, found, [n, k])
    for name, op in (("column_scales", aten.mul), ("column_biases", aten.add)):
        if name in planes:
            found = lowered(op, found, in_order(planes[name], planes.get("perm")))
    return found


def in_order(x: Any, perm: Any | None) -> Any:
    """The last dimension in the order of the planes, which is that of the weight's columns if there is no `perm`."""
    if perm is None:
        return x
    at = [None] * (len(x.get_size()) - 1)
    return lowered(aten._unsafe_index.Tensor, x, [*at, cast(perm, torch.int64)])


def product(x: Any, w: Any, bias: Any | None) -> Any:
    """`x @ w.T + bias` of matrices, by the library that Inductor takes for a plain product."""
    columns = lowered(aten.permute, w, [1, 0])
    if bias is None:
        return lowered(aten.mm, x, columns)
    return lowered(aten.addmm, bias, x, columns)


def _elements(weight: Weights) -> Any:
    """What every code stands for before zero and scale: float32 `[n, k]`."""
    spec, form, size = weight.scheme.spec, weight.form, [weight.n, weight.k]
    if spec.vectors is not None:
        return _vectors(weight, spec.vectors)
    codes = lowered(aten.view, weight.codes, [weight.n, -1])
    if spec.trits:
        codes = _digits(codes, size)
    elif form.bits < 8:
        codes = fields(codes, form.bits, size, lambda row, column: (row, column))
    return decoded_codes(codes, form, table(form, codes))


def _digits(codes: Any, size: list[int]) -> Any:
    """Digits in base 3, the lowest of a byte first, see `fxquant.bits.pack_trits`."""
    device, count = codes.get_device(), TRITS_PER_BYTE
    stored = gathered(codes, size, lambda row, column: (row, quotient(column, count)))
    power = looked_up(
        known(tuple(3.0**i for i in range(count)), codes),
        indices(device, size, lambda row, column: remainder(column, count)),
    )
    whole = lowered(aten.div, cast(stored, torch.int32), cast(power, torch.int32), rounding_mode="trunc")
    return lowered(aten.remainder, whole, 3)


def _vectors(weight: Weights, vectors: Vectors) -> Any:
    """Sums of the codebooks' entries with their signs, see `fxquant.codecs.vectors`."""
    size, planes = [weight.n, weight.k], weight.planes
    rows, columns, device = vectors.rows, vectors.columns, planes["codes"].get_device()
    per_group = max(-(-weight.k // columns) // vectors.groups, 1)
    codes = cast(
        fields(planes["codes"], sum(vectors.books), size, lambda r, c: (quotient(r, rows), quotient(c, columns))),
        torch.int64,
    )
    group = indices(device, size, lambda r, c: quotient(quotient(c, columns), per_group))
    across = indices(device, size, lambda r, c: remainder(r, rows) * columns + remainder(c, columns))
    total: Any = None
    for i, bits in enumerate(vectors.books):
        book = lowered(aten.view, planes[f"codebook{i}"], [-1, rows * columns])
        entry = lowered(aten.bitwise_and, codes, (1 << bits) - 1)
        entry = lowered(aten.add, entry, lowered(aten.bitwise_left_shift, group, bits))
        codes = lowered(aten.bitwise_right_shift, codes, bits)
        found = cast(lowered(aten._unsafe_index.Tensor, book, [entry, across]), torch.float32)
        total = found if total is None else lowered(aten.add, total, found)
    return lowered(aten.mul, total, _signs(planes["signs"], vectors.signs, size)) if vectors.signs else total


def _signs(plane: Any, bits: int, size: list[int]) -> Any:
    """1 and -1 for every weight; with 7 bits the eighth makes the number of minus signs even."""
    field = cast(fields(plane, bits, size, lambda r, c: (r, quotient(c, 8))), torch.int32)
    if bits == 7:
        parity = field
        for shift in (4, 2, 1):
            parity = lowered(aten.bitwise_xor, parity, lowered(aten.bitwise_right_shift, parity, shift))
        parity = lowered(aten.bitwise_left_shift, lowered(aten.bitwise_and, parity, 1), 7)
        field = lowered(aten.bitwise_or, field, parity)
    place = cast(indices(plane.get_device(), size, lambda r, c: remainder(c, 8)), torch.int32)
    bit = lowered(aten.bitwise_and, lowered(aten.bitwise_right_shift, field, place), 1)
    return lowered(aten.add, lowered(aten.mul, cast(bit, torch.float32), -2.0), 1.0)
