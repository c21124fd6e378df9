"""The whole weight decoded by one kernel, for products whose arithmetic is the vendor's library's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import lowered
from fxquant.lowering.formats import Format
from fxquant.lowering.values import all_fields, aten, cast, decoded_codes, offsets, scales, table


def weight(planes: Sequence[Any], form: Format, n: int, k: int, dtype: torch.dtype) -> Any:
    """The `[n, k]` weight in memory: computed in float32, rounded to `dtype`, as `fxquant.codecs.dequantize` does."""
    groups = k // form.group
    fields = planes[0] if form.bits == 8 else all_fields(planes[0], n, k)
    values = lowered(aten.view, decoded_codes(fields, form, table(form, planes[0])), [n, groups, form.group])
    offset = offsets(planes, form, n, k)
    if offset is not None and form.zero != "bias":
        values = lowered(aten.sub, values, lowered(aten.unsqueeze, offset, 2))
    values = lowered(aten.mul, values, lowered(aten.unsqueeze, scales(planes[1], form, n, k), 2))
    if form.zero == "bias":
        values = lowered(aten.add, values, lowered(aten.unsqueeze, offset, 2))
    result = lowered(aten.view, cast(values, dtype), [n, k])
    result.realize()
    return result


def product(x: Any, w: Any, bias: Any | None) -> Any:
    """`x @ w.T + bias` of matrices, by the library that Inductor takes for a plain product."""
    columns = lowered(aten.permute, w, [1, 0])
    if bias is None:
        return lowered(aten.mm, x, columns)
    return lowered(aten.addmm, bias, x, columns)
