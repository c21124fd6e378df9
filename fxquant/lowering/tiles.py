"""Some rows times a weight: a Triton kernel that decodes codes in registers, right before they are multiplied."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fxquant.inductor import from_template, lowered, realized, searches_kernels, triton_template
from fxquant.lowering.formats import Format
from fxquant.lowering.shapes import Choice, Tile, choices, splits, stored
from fxquant.lowering.tiles_source import Variant, source
from fxquant.lowering.values import Weights, aten, cast, table

_DEPTHS = (128, 64, 32, 16)
"""Columns that one step may read. Tensor cores take 16 at least."""
_SPLITS = "SPLITS"
"""How many parts the columns are split into: of a config, and no constant of the kernel."""
_DEEP = 64
"""A step of fewer columns computes too little for what it costs."""


def tiled(x: Any, weight: Weights, bias: Any | None, rows: int) -> Any | None:
    """`x @ W.T + bias` for x `[m, k]`, bfloat16 or float16: `[m, n]`, rounded once.

    Where too few programs would compute for the GPU, each takes a part of the columns. Another kernel adds the parts
    up, which fuses with what reads the result.

    Args:
        x: the input, in which m may be a symbol.
        weight: `[n, k]`.
        bias: `[n]` or None.
        rows: what m is, or likely is.

    Returns:
        None where k and the groups consist of no steps that tensor cores take.
    """
    form, n, k = weight.form, weight.n, weight.k
    configs = list(_configs(_choices(x, form, n, k, rows), form, n, k, rows, x))
    if not configs:
        return None
    parts = configs[0][_SPLITS]
    own = bias if parts == 1 else None
    variant = Variant.of(form, x.get_dtype(), own is not None, parts > 1)
    inputs = [realized(value) for value in _inputs(x, weight, own)]
    kernels = [{key: value for key, value in config.items() if key != _SPLITS} for config in configs]
    m = x.get_size()[0]
    if parts == 1:
        return from_template(_template(variant), inputs, [m, n], x.get_dtype(), kernels)
    stack = from_template(_template(variant), inputs, [parts, m, n], torch.float32, kernels)
    y = lowered(aten.sum, stack, [0])
    return cast(y if bias is None else lowered(aten.add, y, cast(bias, torch.float32)), x.get_dtype())


def _inputs(x: Any, weight: Weights, bias: Any | None) -> Iterator[Any]:
    """In the order of `Variant.inputs`."""
    form, n, k, planes = weight.form, weight.n, weight.k, weight.planes
    yield x
    yield planes["codes"]
    yield lowered(aten.view, planes["scales"] if form.direct else weight.scales(), [n, k // form.group])
    if form.direct and form.zero != "none":
        zeros = planes["biases" if form.zero == "bias" else "zeros"]
        yield lowered(aten.view, zeros, [n, zeros.get_size()[-1] if len(zeros.get_size()) == 2 else k // form.group])
    elif form.zero != "none":
        yield lowered(aten.view, weight.offsets(), [n, k // form.group])
    found = table(form, x)
    if found is not None:
        yield found
    if bias is not None:
        yield bias


def _choices(x: Any, form: Format, n: int, k: int, rows: int) -> tuple[Choice, ...]:
    """The tiles to offer: one in general, which is then taken unmeasured; all of them where kernels are searched."""
    found = choices(stored(), torch.cuda.get_device_name(x.get_device()), form.bits, n, k, rows)
    return found if searches_kernels() else found[:1]


def _configs(
    wanted: Sequence[Choice], form: Format, n: int, k: int, rows: int, x: Any
) -> Iterator[Mapping[str, int | bool]]:
    """What each kernel is compiled with. All of them split columns into as many parts as the first one."""
    seen: set[tuple[int, ...]] = set()
    exact, parts = form.exact(x.get_dtype()), None
    for choice in wanted:
        tile, depth = choice.tile, _depth(choice.tile, form.group, k, exact)
        if depth is None or (key := (tile.rows, tile.columns, depth)) in seen:
            continue
        seen.add(key)
        if parts is None:
            programs = -(-rows // tile.rows) * -(-n // tile.columns)
            parts = choice.splits or splits(programs, k // depth, _processors(x))
        if k // depth % parts:
            continue
        yield {
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": depth,
            "STEPS": k // depth // parts,
            "GROUP": form.group,
            "GROUPS": max(depth // form.group, 1),
            "LOW": form.low,
            "SCALE_LAST": exact and depth <= form.group,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            _SPLITS: parts,
        }


def _processors(x: Any) -> int:
    return int(torch.cuda.get_device_properties(x.get_device()).multi_processor_count)


def _depth(tile: Tile, group: int, k: int, exact: bool) -> int | None:
    """The columns of a step: whole steps within a group where that spares the scaling of weights, else as many."""
    fitting = [d for d in _DEPTHS if d <= tile.depth and k % d == 0 and (group % d == 0 or d % group == 0)]
    within = [d for d in fitting if exact and d >= _DEEP and group % d == 0]
    return next(iter(within or fitting), None)


@functools.cache
def _template(variant: Variant) -> Any:
    return triton_template(variant.name, source(variant))
