"""`fxquant::experts` and `fxquant::gated_experts` of a few tokens, as Inductor compiles them for a GPU.

Every slot is a product of one row with the weight of its own expert, whose planes are found on the device: shapes do
not depend on where tokens go, and the host waits for nothing. All slots are one kernel, which fuses with what stands
around it; the planes of experts that are not hit are not read. Many tokens go to the op as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxquant.inductor import add_lowering, as_it_is, lowered
from fxquant.lowering.dispatch import EXPERT_SLOTS, WAYS, kind_of, ways
from fxquant.lowering.formats import Format, format_of
from fxquant.lowering.gemv import by_field, row_products
from fxquant.lowering.values import aten, cast
from fxquant.scheme import Scheme


def register_experts() -> None:
    """Give Inductor the lowerings, if Inductor has been imported."""
    add_lowering(torch.ops.fxquant.experts.default, lower)
    add_lowering(torch.ops.fxquant.gated_experts.default, lower_gated)


def lower(
    x: Any, ids: Any, planes: Sequence[Any], biases: Sequence[Any], scheme: str, n: int, experts: int, abi: int
) -> Any:
    """Inductor's value of `fxquant::experts` with these arguments."""
    stack = _stack(x, ids, planes, scheme, n, int(x.get_size()[-1]), experts)
    if stack is None:
        return as_it_is(torch.ops.fxquant.experts.default, x, ids, planes, biases, scheme, n, experts, abi)
    return stack.product(x, ids, biases[0] if biases else None)


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
    k = int(x.get_size()[-1])
    one = _stack(x, ids, first, first_scheme, 2 * inner, k, experts)
    two = _stack(x, ids, second, second_scheme, k, inner, experts)
    if one is None or two is None:
        args = (x, ids, weights, first, second, first_scheme, second_scheme, inner, experts, abi)
        return as_it_is(torch.ops.fxquant.gated_experts.default, *args)
    # Products of their own, and not halves of one: so these are one kernel with what is computed of them.
    gate, up = (cast(one.rows(i * inner, inner).product(x, ids, None), torch.float32) for i in range(2))
    hidden = cast(lowered(aten.mul, lowered(aten.mul, gate, lowered(aten.sigmoid, gate)), up), x.get_dtype())
    outputs = cast(two.product(hidden, ids, None), torch.float32)
    known = lowered(aten.where, _present(ids, experts), cast(weights, torch.float32), 0.0)
    total = lowered(aten.sum, lowered(aten.mul, outputs, lowered(aten.unsqueeze, known, 2)), [1])
    return cast(total, x.get_dtype())


@dataclass(frozen=True)
class _Stack:
    """Weights `[experts, n, k]` of one format."""

    planes: Sequence[Any]
    """Each `[experts, n, numbers of a row]`."""
    form: Format
    n: int
    k: int
    experts: int

    def rows(self, first: int, count: int) -> _Stack:
        """So many rows of every weight."""
        planes = [lowered(aten.slice, plane, 1, first, first + count) for plane in self.planes]
        return replace(self, planes=planes, n=count)

    def product(self, x: Any, ids: Any, bias: Any | None) -> Any:
        """`[T, slots, n]`, in the dtype of x, for x `[T, k]` or `[T, slots, k]`."""
        tokens, slots = (int(size) for size in ids.get_size())
        rows, form = tokens * slots * self.n, self.form
        flat = lowered(aten.view, ids, [tokens * slots])
        present = _present(flat, self.experts)
        known = lowered(aten.where, present, flat, 0)
        own = [lowered(aten._unsafe_index.Tensor, plane, [known]) for plane in self.planes]
        own = [lowered(aten.view, plane, [rows, plane.get_size()[2]]) for plane in own]
        y = lowered(aten.view, row_products(self._inputs(x, tokens, slots), own, form, rows, self.k), [-1, self.n])
        if bias is not None:
            y = lowered(aten.add, y, cast(lowered(aten._unsafe_index.Tensor, bias, [known]), torch.float32))
        y = lowered(aten.where, lowered(aten.unsqueeze, present, 1), y, 0.0)
        return lowered(aten.view, cast(y, x.get_dtype()), [tokens, slots, self.n])

    def _inputs(self, x: Any, tokens: int, slots: int) -> list[Any]:
        """Of each field, the inputs of every row of every slot: `[rows, groups, width]`."""
        per_byte, per_token = self.form.per_byte, 1 if len(x.get_size()) == 2 else slots
        shape = [self.k // self.form.group, self.form.group // per_byte]
        fields = lowered(
            aten.view, by_field(x, self.form, tokens * per_token * self.k), [per_byte, tokens, per_token, 1, *shape]
        )
        wide = lowered(aten.expand, fields, [per_byte, tokens, slots, self.n, *shape])
        return [
            lowered(aten.view, lowered(aten.select, wide, 0, i), [tokens * slots * self.n, *shape])
            for i in range(per_byte)
        ]


def _present(ids: Any, experts: int) -> Any:
    return lowered(aten.logical_and, lowered(aten.ge, ids, 0), lowered(aten.lt, ids, experts))


def _stack(x: Any, ids: Any, planes: Sequence[Any], spelling: str, n: int, k: int, experts: int) -> _Stack | None:
    """The weights, or None where no kernel here reads them, for so many slots."""
    sizes = [*ids.get_size(), *x.get_size()]
    if not all(str(size).isdigit() for size in sizes) or kind_of(x.get_device()) not in WAYS or not spelling:
        return None
    slots, form = math.prod(map(int, ids.get_size())), format_of(Scheme.parse(spelling), n, k)
    if form is None or not 0 < slots <= EXPERT_SLOTS or not experts:
        return None
    # Fields of flat blocks are packed across rows: a row need not have bytes of its own.
    by_row = [math.prod(map(int, plane.get_size()[1:])) for plane in planes]
    if any(count % n for count in by_row) or "gemv" not in ways(x.get_device(), form.bits, x.get_dtype(), 1):
        return None
    viewed = [lowered(aten.view, plane, [experts, n, c // n]) for plane, c in zip(planes, by_row, strict=True)]
    return _Stack(viewed, form, n, k, experts)
