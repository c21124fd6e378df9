"""Some rows times a weight: a Triton kernel that decodes codes in registers, right before they are multiplied."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxquant.inductor import from_template, lowered, realized, searches_kernels, triton_template
from fxquant.lowering.dispatch import Tile, tiles
from fxquant.lowering.formats import Format
from fxquant.lowering.tiles_source import Variant, source
from fxquant.lowering.values import aten, table

_DEPTHS = (128, 64, 32, 16)
"""Columns that one step may read. Tensor cores take 16 at least."""
_DEEP = 64
"""A step of fewer columns computes too little for what it costs."""


def tiled(x: Any, planes: Sequence[Any], bias: Any | None, form: Format, n: int, k: int, rows: int) -> Any | None:
    """`x @ W.T + bias` for x `[m, k]`, bfloat16 or float16: `[m, n]`, rounded once.

    Args:
        x: the input, in which m may be a symbol.
        planes: as `Scheme.planes` orders them.
        bias: `[n]` or None.
        form: how to read the planes.
        n: rows of the weight.
        k: its columns.
        rows: what m is, or likely is.

    Returns:
        None where k and the groups consist of no steps that tensor cores take.
    """
    found = table(form, x)
    variant = Variant(form.bits, form.zero, bool(form.table), form.power, form.exact(x.get_dtype()), bias is not None)
    inputs = [realized(value) for value in _inputs(x, planes, found, bias, form, n, k)]
    configs = list(_configs(form, k, rows, variant.exact))
    if not configs:
        return None
    return from_template(_template(variant), inputs, [x.get_size()[0], n], configs)


def _inputs(
    x: Any, planes: Sequence[Any], found: Any | None, bias: Any | None, form: Format, n: int, k: int
) -> Iterator[Any]:
    """In the order of `Variant.inputs`."""
    yield x
    yield planes[0]
    yield lowered(aten.view, planes[1], [n, k // form.group])
    if form.zero != "none":
        zeros = planes[2]
        yield lowered(aten.view, zeros, [n, zeros.get_size()[-1] if len(zeros.get_size()) == 2 else k // form.group])
    if found is not None:
        yield found
    if bias is not None:
        yield bias


def _configs(form: Format, k: int, rows: int, exact: bool) -> Iterator[Mapping[str, int | bool]]:
    """The tiles to offer: one in general, which is then taken unmeasured; all of them where kernels are searched."""
    wanted = tiles(rows)
    seen: set[tuple[int, ...]] = set()
    for tile in wanted if searches_kernels() else wanted[:1]:
        depth = _depth(tile, form.group, k, exact)
        if depth is None or (key := (tile.rows, tile.columns, depth)) in seen:
            continue
        seen.add(key)
        yield {
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": depth,
            "GROUP": form.group,
            "GROUPS": max(depth // form.group, 1),
            "LOW": form.low,
            "SCALE_LAST": exact and depth <= form.group,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _depth(tile: Tile, group: int, k: int, exact: bool) -> int | None:
    """The columns of a step: whole steps within a group where that spares the scaling of weights, else as many."""
    fitting = [d for d in _DEPTHS if d <= tile.depth and k % d == 0 and (group % d == 0 or d % group == 0)]
    within = [d for d in fitting if exact and d >= _DEEP and group % d == 0]
    return next(iter(within or fitting), None)


@functools.cache
def _template(variant: Variant) -> Any:
    return triton_template(variant.name, source(variant))
