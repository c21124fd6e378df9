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
from fxquant.lowering.gemv import by_place, row_products
from fxquant.lowering.values import Weights, aten, cast
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
    """What kernels read of weights `[experts, n, k]`, each `[experts, n, ...]`."""

    codes: Any
    scales: Any
    offsets: Any | None
    form: Format
    n: int
    k: int

    def rows(self, first: int, count: int) -> _Stack:
        """So many rows of every weight."""
        codes, scales, offsets = (
            None if part is None else lowered(aten.slice, part, 1, first, first + count)
            for part in (self.codes, self.scales, self.offsets)
        )
        return replace(self, codes=codes, scales=scales, offsets=offsets, n=count)

    def product(self, x: Any, ids: Any, bias: Any | None) -> Any:
        """`[T, slots, n]`, in the dtype of x, for x `[T, k]` or `[T, slots, k]`."""
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
        return lowered(aten.view, cast(y, x.get_dtype()), [tokens, slots, self.n])

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


def _stack(x: Any, ids: Any, planes: Sequence[Any], spelling: str, n: int, k: int, experts: int) -> _Stack | None:
    """The weights, or None where no kernel here reads them, for so many slots."""
    sizes = [*ids.get_size(), *x.get_size()]
    if not all(str(size).isdigit() for size in sizes) or kind_of(x.get_device()) not in WAYS or not spelling:
        return None
    scheme = Scheme.parse(spelling)
    slots, form = math.prod(map(int, ids.get_size())), format_of(scheme, n, k)
    if form is None or not form.in_units or scheme.columns or not 0 < slots <= EXPERT_SLOTS or not experts:
        return None
    if "gemv" not in ways(x.get_device(), form, x.get_dtype(), 1):
        return None
    weights = Weights(dict(zip(scheme.planes(n, k), planes, strict=True)), scheme, form, n, k, experts)
    return _Stack(weights.codes, weights.scales(), weights.offsets(), form, n, k)
