"""What the planes of a weight stand for, in Inductor's own terms: pointwise code that fuses with what reads it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fxquant.inductor import constant, lowered
from fxquant.lowering.formats import Format

aten, prims = torch.ops.aten, torch.ops.prims
_BIAS, _MANTISSA = 127, 23
_SMALLEST_POWER, _NAN = 0x00400000, 0x7FC00000
"""Bit patterns of float32: `2**-127`, which is subnormal, and nan."""


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value in another dtype."""
    # Inductor copies where nothing is to be converted.
    return value if value.get_dtype() == dtype else lowered(prims.convert_element_type, value, dtype)


def low_half(codes: Any) -> Any:
    """The fields of even columns."""
    return lowered(aten.bitwise_and, codes, 15)


def high_half(codes: Any) -> Any:
    """The fields of odd columns."""
    return lowered(aten.bitwise_right_shift, codes, 4)


def all_fields(codes: Any, n: int, count: int) -> Any:
    """The first `count` fields of every row of `[n, ceil(count / 2)]` bytes."""
    spread = lowered(aten.expand, lowered(aten.unsqueeze, codes, 2), [n, -(-count // 2), 2])
    bytes_ = lowered(aten.slice, lowered(aten.view, spread, [n, -(-count // 2) * 2]), 1, 0, count)
    columns = lowered(
        prims.iota, count, start=0, step=1, dtype=torch.int32, device=codes.get_device(), requires_grad=False
    )
    shift = lowered(aten.mul, lowered(aten.bitwise_and, columns, 1), 4)
    return low_half(lowered(aten.bitwise_right_shift, cast(bytes_, torch.int32), shift))


def table(form: Format, like: Any) -> Any | None:
    """The values of the format's table as a constant on the device of `like`; None for integers."""
    if not form.table:
        return None
    return constant(_table(form.table, like.get_device()))


@functools.lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # One tensor for all weights: Inductor knows equal constants by their memory.
    return torch.tensor(values, dtype=torch.float32, device=device)


def decoded_codes(fields: Any, form: Format, values: Any | None) -> Any:
    """What codes stand for before zero and scale, float32. `values` is from `table`."""
    if values is not None:
        return lowered(aten._unsafe_index.Tensor, values, [cast(fields, torch.int64)])
    number = cast(fields, torch.float32)
    return lowered(aten.add, number, float(form.low)) if form.low else number


def scales(plane: Any, form: Format, n: int, k: int) -> Any:
    """Float32 scales `[n, groups]`."""
    grid = lowered(aten.view, plane, [n, k // form.group])
    if not form.power:
        return cast(grid, torch.float32)
    codes = cast(grid, torch.int32)
    bits = lowered(aten.bitwise_left_shift, codes, _MANTISSA)
    bits = lowered(aten.where, lowered(aten.eq, codes, 0), _SMALLEST_POWER, bits)
    bits = lowered(aten.where, lowered(aten.eq, codes, 2 * _BIAS + 1), _NAN, bits)
    return lowered(aten.view.dtype, bits, torch.float32)


def offsets(planes: Sequence[Any], form: Format, n: int, k: int) -> Any | None:
    """Zeros or biases, float32 `[n, groups]`; None where there are none."""
    if form.zero == "none":
        return None
    groups = k // form.group
    if form.zero == "int" and form.bits == 4:
        return cast(all_fields(planes[2], n, groups), torch.float32)
    return cast(lowered(aten.view, planes[2], [n, groups]), torch.float32)
