"""`fxquant::experts` and `fxquant::gated_experts`, as Inductor compiles them for a GPU.

Of a few tokens, every slot is a product of one row with the weight of its own expert, whose planes are found on the
device. All slots are one kernel, which fuses with what stands around it. Of many tokens, slots are sorted by expert
into blocks of rows, which tensor cores multiply with the one weight that is theirs. Either way shapes do not depend on
where tokens go, the host waits for nothing, and the codes of experts that are not hit are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxquant.inductor import add_lowering, as_it_is, is_positive, likely_size, lowered, once_for
from fxquant.lowering.activations import coded, decoded, encodes, numbers
from fxquant.lowering.dispatch import BLOCK_ROWS, EXPERT_SLOTS, UNKNOWN_ROWS, WAYS, kind_of, ways
from fxquant.lowering.formats import Format, format_of
from fxquant.lowering.gemv import by_place, row_products
from fxquant.lowering.tiles import Scaled, tiled_blocks
from fxquant.lowering.values import Weights, aten, cast
from fxquant.scheme import Activation, Scheme


def register_experts() -> None:
    """Give Inductor the lowerings, if Inductor has been imported."""
    add_lowering(torch.ops.fxquant.experts.default, lower)
    add_lowering(torch.ops.fxquant.gated_experts.default, lower_gated)


def lower(
    x: Any, ids: Any, planes: Sequence[Any], biases: Sequence[Any], scheme: str, n: int, experts: int, abi: int
) -> Any:
    """Inductor's value of `fxquant::experts` with these arguments."""
    bias, weights = biases[0] if biases else None, _weights(x, planes, scheme, n, experts)
    stack = None if weights is None else _stack(x, ids, weights)
    if stack is not None:
        return stack.product(_row(x, stack.activation), ids, bias, x.get_dtype())
    y = None if weights is None else _by_blocks(x, ids, weights, bias, abi)
    if y is not None:
        return y
    return as_it_is(torch.ops.fxquant.experts.default, x, ids, planes, biases, scheme, n, experts, abi)


def lower_gated(
    x: Any,
    ids: Any,
    weights: Any,
    first: Sequence[Any],
    second: Sequence[Any],
    first_scheme: str,
    second_scheme: str,
    inner: int,
    experts: int,
    abi: int,
) -> Any:
    """Inductor's value of `fxquant::gated_experts` with these arguments."""
    one, two = (
        None if weights is None else _stack(x, ids, weights)
        for weights in (
            _weights(x, first, first_scheme, 2 * inner, experts),
            _weights(x, second, second_scheme, int(x.get_size()[-1]), experts, inner),
        )
    )
    if one is None or two is None or one.activation or two.activation:
        args = (x, ids, weights, first, second, first_scheme, second_scheme, inner, experts, abi)
        return as_it_is(torch.ops.fxquant.gated_experts.default, *args)
    # Products of their own, and not halves of one: so these are one kernel with what is computed of them.
    gate, up = (cast(one.rows(i * inner, inner).product(x, ids, None, x.get_dtype()), torch.float32) for i in range(2))
    hidden = cast(lowered(aten.mul, lowered(aten.mul, gate, lowered(aten.sigmoid, gate)), up), x.get_dtype())
    outputs = cast(two.product(hidden, ids, None, x.get_dtype()), torch.float32)
    known = lowered(aten.where, _present(ids, experts), cast(weights, torch.float32), 0.0)
    total = lowered(aten.sum, lowered(aten.mul, outputs, lowered(aten.unsqueeze, known, 2)), [1])
    return cast(total, x.get_dtype())


@dataclass(frozen=True)
class _Stack:
    """What kernels read of weights `[experts, n, k]`, each `[experts, n, ...]`."""

    codes: Any
    scales: Any
    offsets: Any | None
    form: Format
    activation: Activation | None
    n: int
    k: int

    def rows(self, first: int, count: int) -> _Stack:
        """So many rows of every weight."""
        codes, scales, offsets = (
            None if part is None else lowered(aten.slice, part, 1, first, first + count)
            for part in (self.codes, self.scales, self.offsets)
        )
        return replace(self, codes=codes, scales=scales, offsets=offsets, n=count)

    def product(self, x: Any, ids: Any, bias: Any | None, dtype: torch.dtype) -> Any:
        """`[T, slots, n]` for x `[T, k]` or `[T, slots, k]`, what it stands for where it is codes."""
        tokens, slots = (int(size) for size in ids.get_size())
        rows = tokens * slots * self.n
        flat = lowered(aten.view, ids, [tokens * slots])
        present = _present(flat, int(self.codes.get_size()[0]))
        known = lowered(aten.where, present, flat, 0)

        def own(part: Any) -> Any:
            gathered = lowered(aten._unsafe_index.Tensor, part, [known])
            return lowered(aten.view, gathered, [rows, part.get_size()[2]])

        offsets = None if self.offsets is None else own(self.offsets)
        y = row_products(self._inputs(x, tokens, slots), own(self.codes), own(self.scales), offsets, self.form)
        y = lowered(aten.view, y, [-1, self.n])
        if bias is not None:
            y = lowered(aten.add, y, cast(lowered(aten._unsafe_index.Tensor, bias, [known]), torch.float32))
        y = lowered(aten.where, lowered(aten.unsqueeze, present, 1), y, 0.0)
        return lowered(aten.view, cast(y, dtype), [tokens, slots, self.n])

    def _inputs(self, x: Any, tokens: int, slots: int) -> list[Any]:
        """Of each code of a unit, the inputs of every row of every slot: `[rows, groups, units]`."""
        per_unit, per_token = self.form.per_unit, 1 if len(x.get_size()) == 2 else slots
        shape = [self.k // self.form.group, self.form.group // per_unit]
        fields = lowered(
            aten.view, by_place(x, self.form, tokens * per_token * self.k), [per_unit, tokens, per_token, 1, *shape]
        )
        wide = lowered(aten.expand, fields, [per_unit, tokens, slots, self.n, *shape])
        return [
            lowered(aten.view, lowered(aten.select, wide, 0, i), [tokens * slots * self.n, *shape])
            for i in range(per_unit)
        ]


def _present(ids: Any, experts: int) -> Any:
    return lowered(aten.logical_and, lowered(aten.ge, ids, 0), lowered(aten.lt, ids, experts))


def _weights(x: Any, planes: Sequence[Any], spelling: str, n: int, experts: int, k: int = 0) -> Weights | None:
    """The weights `[experts, n, k]`, or None where no kernel here reads them. k: 0 for that of x."""
    k = k or int(x.get_size()[-1])
    if kind_of(x.get_device()) not in WAYS or not spelling or not experts:
        return None
    scheme = Scheme.parse(spelling)
    form, activation = format_of(scheme, n, k), scheme.activation
    if form is None or not form.in_units or scheme.columns:
        return None
    # Static scales are those of experts, so that a token has codes for each.
    if activation is not None and (activation.static or not encodes(x, activation)):
        return None
    return Weights(dict(zip(scheme.planes(n, k), planes, strict=True)), scheme, form, n, k, experts)


def _stack(x: Any, ids: Any, weights: Weights) -> _Stack | None:
    """What kernels read for a few slots; None for many."""
    if not all(str(size).isdigit() for size in ids.get_size()):
        return None
    if not 0 < math.prod(map(int, ids.get_size())) <= EXPERT_SLOTS:
        return None
    if "gemv" not in ways(x.get_device(), weights.form, x.get_dtype(), 1):
        return None
    planes = weights.codes, weights.scales(), weights.offsets()
    return _Stack(*planes, weights.form, weights.scheme.activation, weights.n, weights.k)


def _row(x: Any, activation: Activation | None) -> Any:
    """x, or what it stands for: float32."""
    if activation is None:
        return x
    return once_for(x, (activation, torch.float32), lambda: decoded(*coded(x, activation, None), activation))


def _by_blocks(x: Any, ids: Any, weights: Weights, bias: Any | None, abi: int) -> Any | None:
    """`[T, slots, n]` for many slots; None where tensor cores do not take these weights, or so many rows of each."""
    tokens, slots = ids.get_size()
    mean = -(-likely_size(tokens * slots, UNKNOWN_ROWS) // weights.experts)
    activation, dtype = weights.scheme.activation, x.get_dtype()
    halves = torch.bfloat16 if activation else dtype
    # Where there may be no tokens, there may be no row to read.
    if not is_positive(tokens * slots) or "tiles" not in ways(x.get_device(), weights.form, halves, mean):
        return None
    if activation and not weights.form.exact(halves):
        return None
    size = next((rows for rows in BLOCK_ROWS if mean <= rows), BLOCK_ROWS[-1])

    def make() -> Any:
        return as_it_is(torch.ops.fxquant.expert_blocks.default, ids, weights.experts, size, abi)

    owners, sources, places = once_for(ids, (weights.experts, size), make)
    if len(x.get_size()) == 2:
        sources = lowered(aten.div, sources, slots, rounding_mode="trunc")

    def rows_of(value: Any) -> Any:
        return lowered(aten._unsafe_index.Tensor, lowered(aten.view, value, [-1, value.get_size()[-1]]), [sources])

    scaled = None
    if activation:
        codes, scales = coded(x, activation, None)
        x, scaled = numbers(codes, halves), Scaled(rows_of(scales), activation.group or weights.k, dtype)
    y = tiled_blocks(rows_of(x), owners, weights, bias, size, scaled)
    if y is None:
        return None
    y = lowered(aten.view, lowered(aten._unsafe_index.Tensor, y, [places]), [tokens, slots, weights.n])
    return lowered(aten.where, lowered(aten.unsqueeze, _present(ids, weights.experts), 2), y, 0.0)
