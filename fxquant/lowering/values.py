"""What the planes of weights stand for, in Inductor's own terms: pointwise code that fuses with what reads it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.inductor import constant, fields, gathered, lowered, quotient
from fxquant.lowering.formats import Format
from fxquant.scheme import DOUBLE_QUANT_BLOCK, SCALE_TYPES, TENSOR, Block, ScaleType, Scheme, dynamic_values

aten, prims = torch.ops.aten, torch.ops.prims
_FLOAT = torch.float32
Place = Callable[[Any, Any], tuple[Any, Any]]
"""From the row of a weight and a column of it to the row and the column of something stored for it."""
_BIAS, _MANTISSA = 127, 23
_SMALLEST_POWER, _NAN = 0x00400000, 0x7FC00000
"""Bit patterns of float32: `2**-127`, which is subnormal, and nan."""


@dataclass(frozen=True)
class Weights:
    """The planes of weights `[experts, n, k]` of one scheme, each with a first dimension for experts; one is none."""

    planes: Mapping[str, Any]
    scheme: Scheme
    form: Format
    n: int
    k: int
    experts: int = 1

    @property
    def codes(self) -> Any:
        """The bytes of every row: `[experts, n, bytes]`."""
        return lowered(aten.view, self.planes["codes"], [self.experts, self.n, -1])

    def scales(self) -> Any:
        """Float32 `[experts, n, groups]`."""
        if not self.scheme.double:
            return self._level("scales", "scale_scales")
        codes = self._stored("scales", self.scheme.block)
        block = Block(1, self.scheme.block.columns * DOUBLE_QUANT_BLOCK, flat=True)
        scale = self._stored("scale_scales", block)
        offset = self._stored("scale_offset", TENSOR)
        return lowered(aten.add, lowered(aten.mul, looked_up(known(dynamic_values(), codes), codes), scale), offset)

    def offsets(self) -> Any | None:
        """Zeros or biases, float32 `[experts, n, groups]`; None where there are none."""
        match self.scheme.zero:
            case "none":
                return None
            case "bias":
                return self._level("biases", "bias_scales")
            case "float":
                return self._level("zeros", None)
            case "int":
                spec = self.scheme.spec
                return cast(self._stored("zeros", self.scheme.block, spec.bits if spec.dtype is None else 0), _FLOAT)

    def _level(self, name: str, outer: str | None) -> Any:
        kind = SCALE_TYPES[self.scheme.scale]
        stored = self._stored(name, self.scheme.block, kind.bits if kind.dtype is None else 0)
        value = _scale(stored, kind)
        if self.scheme.outer is None or outer is None:
            return value
        block = TENSOR if self.scheme.block.flat else self.scheme.outer.block
        return lowered(aten.mul, value, cast(self._stored(outer, block), _FLOAT))

    def _stored(self, name: str, block: Block, bits: int = 0) -> Any:
        """What is stored for the blocks in which groups lie; fields of so many bits, where these are not 0."""
        rows = 1 if block.flat else -(-self.n // (block.rows or self.n))
        plane = lowered(aten.view, self.planes[name], [self.experts * rows, -1])
        place, group = _place(block, self.k), self.form.group

        def at(expert: Any, row: Any, index: Any) -> tuple[Any, Any]:
            down, across = place(row, index * group)
            return expert * rows + down, across

        size = [self.experts, self.n, self.k // group]
        return fields(plane, bits, size, at) if bits else gathered(plane, size, at)


def _place(block: Block, k: int) -> Place:
    if block.flat:
        return lambda row, column: (0, quotient(row * k + column, block.columns))
    down, across = block.rows, block.columns
    return lambda row, column: (quotient(row, down) if down else 0, quotient(column, across) if across else 0)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value in another dtype."""
    # Inductor copies where nothing is to be converted.
    return value if value.get_dtype() == dtype else lowered(prims.convert_element_type, value, dtype)


def unit_fields(codes: Any, form: Format, groups: int) -> list[Any]:
    """The codes of units of rows `[n, bytes]`, each `[n, groups, units]`: that of the first columns first."""
    bits, units = form.bits, form.group // form.per_unit
    size = [int(codes.get_size()[0]), groups, units]
    if 8 % bits == 0:
        found, width = lowered(aten.view, codes, size), 8
    else:
        width = bits * form.per_unit
        found = fields(codes, width, size, lambda row, group, unit: (row, group * units + unit))
    if bits == width:
        return [found]
    shifted = [lowered(aten.bitwise_right_shift, found, shift) if shift else found for shift in range(0, width, bits)]
    return [*(lowered(aten.bitwise_and, code, (1 << bits) - 1) for code in shifted[:-1]), shifted[-1]]


def table(form: Format, like: Any) -> Any | None:
    """The values of the format's table as a constant on the device of `like`; None where there is none."""
    return known(form.table, like) if form.table else None


def known(values: tuple[float, ...], like: Any) -> Any:
    """These numbers as a constant, float32, on the device of `like`."""
    return constant(_table(values, like.get_device()))


@functools.lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # One tensor for all weights: Inductor knows equal constants by their memory.
    return torch.tensor(values, dtype=torch.float32, device=device)


def decoded_codes(codes: Any, form: Format, values: Any | None) -> Any:
    """What codes stand for before zero and scale, float32. `values` is from `table`."""
    if values is not None:
        return looked_up(values, codes)
    if form.pattern is not None:
        return small_float(codes, form.pattern)
    number = cast(codes, _FLOAT)
    return lowered(aten.add, number, float(form.low)) if form.low else number


def looked_up(values: Any, codes: Any) -> Any:
    """The values of codes in a table."""
    return lowered(aten._unsafe_index.Tensor, values, [cast(codes, torch.int64)])


def _scale(stored: Any, kind: ScaleType) -> Any:
    """Float32 scales of one level, of what is stored of them."""
    if kind.kind == "power":
        codes = cast(stored, torch.int32)
        bits = lowered(aten.bitwise_left_shift, codes, _MANTISSA)
        bits = lowered(aten.where, lowered(aten.eq, codes, 0), _SMALLEST_POWER, bits)
        bits = lowered(aten.where, lowered(aten.eq, codes, 2 * _BIAS + 1), _NAN, bits)
        return lowered(aten.view.dtype, bits, _FLOAT)
    if kind.pattern is not None:
        return small_float(stored, kind.pattern)
    value = cast(stored, _FLOAT)
    if kind.dtype is None:
        value = lowered(aten.mul, value, float(kind.step)) if kind.step != 1 else value
        value = lowered(aten.add, value, float(kind.low)) if kind.low else value
    return value


def small_float(codes: Any, pattern: torch.dtype) -> Any:
    """Bit patterns of 8-bit floats as float32, on every GPU: by way of float16, whose exponent has five bits."""
    codes = cast(codes, torch.int16)
    if pattern == torch.float8_e5m2:
        return cast(lowered(aten.view.dtype, lowered(aten.bitwise_left_shift, codes, 8), torch.float16), _FLOAT)
    assert pattern == torch.float8_e4m3fn
    magnitude = lowered(aten.bitwise_and, codes, 0x7F)
    sign = lowered(aten.bitwise_left_shift, lowered(aten.bitwise_and, codes, 0x80), 8)
    bits = lowered(aten.bitwise_or, lowered(aten.bitwise_left_shift, magnitude, 7), sign)
    # Their exponents are 7 and 15 more than what they stand for.
    value = lowered(aten.mul, cast(lowered(aten.view.dtype, bits, torch.float16), _FLOAT), 256.0)
    return lowered(aten.where, lowered(aten.eq, magnitude, 0x7F), math.nan, value)
