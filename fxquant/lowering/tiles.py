"""Some rows times a weight: a Triton kernel that decodes codes in registers, right before they are multiplied."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.inductor import from_template, lowered, realized, searches_kernels, triton_template
from fxquant.lowering.shapes import Choice, Tile, choices, splits, stored
from fxquant.lowering.tiles_source import Variant, source
from fxquant.lowering.values import Weights, aten, cast, table

_DEPTHS = (128, 64, 32, 16)
"""Columns that one step may read. Tensor cores take 16 at least."""
_SPLITS = "SPLITS"
"""How many parts the columns are split into: of a config, and no constant of the kernel."""
_DEEP = 64
"""A step of fewer columns computes too little for what it costs."""


@dataclass(frozen=True)
class Scaled:
    """What x is multiplied by behind products, where it is codes."""

    scales: Any
    """Float32 `[m, groups]`."""
    group: int
    """Columns that share one."""
    dtype: torch.dtype
    """Of the result."""


def tiled(x: Any, weight: Weights, bias: Any | None, rows: int, scaled: Scaled | None = None) -> Any | None:
    """`x @ W.T + bias` for x `[m, k]`, bfloat16 or float16: `[m, n]`, rounded once.

    Where too few programs would compute for the GPU, each takes a part of the columns. Another kernel adds the parts
    up, which fuses with what reads the result.

    Args:
        x: the input, in which m may be a symbol.
        weight: `[n, k]`.
        bias: `[n]` or None.
        rows: what m is, or likely is.
        scaled: what the result is x times, besides.

    Returns:
        None where k and the groups consist of no steps that tensor cores take.
    """
    configs = _configs(_choices(x, weight, rows), weight, rows, x, scaled)
    if not configs:
        return None
    parts = configs[0][_SPLITS]
    y = _product(x, weight, bias if parts == 1 else None, None, configs, scaled)
    if parts == 1 or y is None:
        return y
    y = lowered(aten.sum, y, [0])
    y = y if bias is None else lowered(aten.add, y, cast(bias, torch.float32))
    return cast(y, scaled.dtype if scaled else x.get_dtype())


def tiled_blocks(
    x: Any, owners: Any, weights: Weights, bias: Any | None, size: int, scaled: Scaled | None = None
) -> Any | None:
    """As `tiled`, for x of blocks of rows that have one expert each; of blocks without an expert, the bias of one.

    Args:
        x: `[blocks * size, k]`, bfloat16 or float16.
        owners: `[blocks]`, their experts, or -1.
        weights: `[experts, n, k]`.
        bias: `[experts, n]` or None.
        size: rows of a block, a power of two.
        scaled: as there.
    """
    fitting = [choice for choice in _choices(x, weights, size) if size % choice.tile.rows == 0]
    configs = _configs([Choice(choice.tile, 1) for choice in fitting], weights, size, x, scaled)
    if not configs:
        return None
    return _product(x, weights, bias, owners, [{**config, "BLOCK_ROWS": size} for config in configs], scaled)


def _product(
    x: Any,
    weight: Weights,
    bias: Any | None,
    owners: Any | None,
    configs: Sequence[Mapping[str, int | bool]],
    scaled: Scaled | None = None,
) -> Any | None:
    """What the kernel gives by the best of these configs, which split columns into as many parts; the parts as such."""
    form, parts = weight.form, configs[0][_SPLITS]
    variant = Variant.of(form, x.get_dtype(), bias is not None, parts > 1, owners is not None, scaled is not None)
    values = (x, *_planes(weight, owners is not None), bias, owners, scaled.scales if scaled else None)
    inputs = [realized(value) for value in values if value is not None]
    kernels = [{key: value for key, value in config.items() if key != _SPLITS} for config in configs]
    size, dtype = [x.get_size()[0], weight.n], scaled.dtype if scaled else x.get_dtype()
    if parts > 1:
        size, dtype = [parts, *size], torch.float32
    return from_template(_template(variant), inputs, size, dtype, kernels)


def _planes(weight: Weights, experts: bool) -> Iterator[Any]:
    """In the order of `Variant.inputs`, `[experts, n, ...]` or `[n, ...]`."""
    form, planes = weight.form, weight.planes
    rows = [weight.experts, weight.n] if experts else [weight.n]
    by_group = [*rows, weight.k // form.group]
    yield lowered(aten.view, planes["codes"], [*rows, -1])
    yield lowered(aten.view, planes["scales"] if form.direct else weight.scales(), by_group)
    if form.direct and form.zero != "none":
        zeros = planes["biases" if form.zero == "bias" else "zeros"]
        yield lowered(aten.view, zeros, [*rows, -1])
    elif form.zero != "none":
        yield lowered(aten.view, weight.offsets(), by_group)
    found = table(form, planes["codes"])
    if found is not None:
        yield found


def _choices(x: Any, weight: Weights, rows: int) -> tuple[Choice, ...]:
    """The tiles to offer, the best first."""
    name = torch.cuda.get_device_name(x.get_device())
    return choices(stored(), name, weight.form.bits, weight.n, weight.k, rows)


def _configs(
    wanted: Sequence[Choice], weight: Weights, rows: int, x: Any, scaled: Scaled | None = None
) -> list[dict[str, int | bool]]:
    """What each kernel is compiled with. All of them split columns into as many parts as the first one.

    One, which is then taken unmeasured; for each choice one where kernels are searched.
    """
    found: dict[tuple[int, ...], dict[str, int | bool]] = {}
    form, n, k, parts = weight.form, weight.n, weight.k, None
    exact, group = form.exact(x.get_dtype()), math.gcd(form.group, scaled.group if scaled else 0)
    for choice in wanted if searches_kernels() else wanted[:1]:
        tile, depth = choice.tile, _depth(choice.tile, group, k, exact, scaled is not None)
        if depth is None:
            continue
        if parts is None:
            programs = -(-rows // tile.rows) * -(-n // tile.columns)
            parts = choice.splits or splits(programs, k // depth, _processors(x))
        if k // depth % parts:
            continue
        config = {
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": depth,
            "STEPS": k // depth // parts,
            "GROUP": form.group,
            "GROUPS": max(depth // form.group, 1),
            "LOW": form.low,
            "SCALE_LAST": exact and depth <= form.group,
            **({"X_GROUP": scaled.group} if scaled else {}),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            _SPLITS: parts,
        }
        found.setdefault((tile.rows, tile.columns, depth), config)
    return list(found.values())


def _processors(x: Any) -> int:
    return int(torch.cuda.get_device_properties(x.get_device()).multi_processor_count)


def _depth(tile: Tile, group: int, k: int, exact: bool, inside: bool) -> int | None:
    """The columns of a step: whole steps within a group where that spares the scaling of weights, else as many.

    Where they have to be `inside` of a group, no more than that.
    """
    fitting = [d for d in _DEPTHS if d <= tile.depth and k % d == 0 and (group % d == 0 or d % group == 0)]
    within = [d for d in fitting if exact and (d >= _DEEP or inside) and group % d == 0]
    return next(iter(within if inside else within or fitting), None)


@functools.cache
def _template(variant: Variant) -> Any:
    return triton_template(variant.name, source(variant))
