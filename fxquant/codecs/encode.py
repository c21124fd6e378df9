"""From float weights to planes, for every scheme that can be made: scales first, then the codes nearest to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant import native
from fxquant.bits import pack, pack_trits
from fxquant.codecs.blocks import areas, batches, budget, read
from fxquant.codecs.columns import by_norm
from fxquant.codecs.decode import alignment, packed_columns
from fxquant.codecs.double import double
from fxquant.codecs.family import TINY, Family, bounded, reciprocal
from fxquant.codecs.finite import magnitude
from fxquant.codecs.grid import Grid, Level, family_of
from fxquant.codecs.hqq import hqq, hqq_problem
from fxquant.codecs.leveled import leveled
from fxquant.codecs.offsets import offset
from fxquant.codecs.rules import RULES, fill
from fxquant.codecs.scales import Plain, scale_format
from fxquant.codecs.search import SCALE_SEARCHES, ScaleSearch, Search
from fxquant.errors import SchemeError, nearest
from fxquant.scheme import COLUMNS, Element, Scheme

_SAFE = 1024.0
"""No rule of a library makes of weights up to this magnitude a scale that fp16, whose largest number is 65504, cannot
hold."""


@torch.no_grad()
def quantize(
    weight: Tensor,
    scheme: Scheme,
    search: ScaleSearch = "least_squares",
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The planes that hold a weight under a scheme.

    Codes are the nearest ones to the weight at the scales as they are stored. Memory beyond the weight and the planes
    stays bounded, whatever their size, except for what grows with the number of blocks: some float32 per block where
    scales have two levels or are chosen as a library does, one byte per block where zeros or scales are packed; and for
    schemes that permute columns, one copy of the weight.

    Args:
        weight: `[N, K]`, any float dtype and strides, finite (see `all_finite`), on any device.
        scheme: how to store it.
        search: `absmax` takes the scale that spans the range of a block: torchao's affine primitives for integers,
            bitsandbytes' rule for nf4 and fp4 (bit-identical to its CPU functions), absmax / 448 for fp8.
            `least_squares` takes the scale (and zero) with the least squared error that a search finds, which is never
            more than that of `absmax`; scales of signed integers may be negative then.
            `minmax` is `absmax` with ranges that need not include 0, for float zeros and biases. `hqq` moves the zeros
            that `minmax` has, see `fxquant.codecs.hqq`. The name of a library takes the rule by which that library
            chooses scales, zeros and codes, bit for bit, see `fxquant.codecs.rules`.
        out: planes to write to, as `scheme.planes(N, K)` says; they may be strided. New ones by default.

    Returns:
        Planes by name, in the order of `scheme.planes(N, K)`; on the meta device, empty ones.

    Raises:
        SchemeError: when the scheme cannot hold the weight, or cannot be made from a weight alone; when `out` are not
            its planes; when there is no such search, or not for this scheme.
    """
    check_search(scheme, search)
    rule = RULES[search](scheme) if search in RULES else None
    planes = _planes(weight, scheme, out)
    if weight.is_meta:
        return planes
    weight = _prepared(weight, planes)
    if not weight.numel():
        return planes
    if rule is not None:
        fill(rule, search, weight, scheme, planes)
        return planes
    search = "absmax" if search in RULES else search
    if native.quantize(weight, scheme, search, planes, double):
        return planes
    family = family_of(scheme, weight.device)
    grid = _grid(weight, scheme, family, search, planes)
    if grid.zeros is not None:
        zeros = grid.zeros.view(-1, grid.zeros.shape[-1])
        planes["zeros"].copy_(zeros if scheme.spec.dtype is not None else pack(zeros, scheme.spec.bits))
    _encode(weight, grid, family, planes["codes"])
    return planes


def _planes(weight: Tensor, scheme: Scheme, out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if weight.ndim != 2:
        raise SchemeError(f"only a matrix can be quantized, got a weight of shape {list(weight.shape)}")
    n, k = weight.shape
    if misfit := scheme.misfit(n, k):
        raise SchemeError(f"{scheme} cannot hold a weight of shape {[n, k]}: {misfit}")
    specs = scheme.planes(n, k)
    if out is None:
        new = torch.empty if weight.numel() else torch.zeros
        return {name: new(spec.shape, dtype=spec.dtype, device=weight.device) for name, spec in specs.items()}
    expected = {name: (spec.shape, spec.dtype, weight.device) for name, spec in specs.items()}
    given = {name: (tuple(plane.shape), plane.dtype, plane.device) for name, plane in out.items()}
    if given != expected:
        raise SchemeError(
            f"`out` are not the planes of a {scheme} weight of shape {[n, k]}\n  expected {expected}\n  got {given}"
        )
    return {name: out[name].zero_() if not weight.numel() else out[name] for name in specs}


def check_search(scheme: Scheme, search: ScaleSearch) -> None:
    """Refuse a scheme that no weight can be quantized to, and a search that does not apply to a scheme.

    Raises:
        SchemeError: says why.
    """
    if search not in SCALE_SEARCHES:
        raise SchemeError(
            f"no scale search is called {search!r}{nearest(search, SCALE_SEARCHES)}\n"
            f"  scale searches: {', '.join(SCALE_SEARCHES)}"
        )
    if scheme.spec.vectors is not None:
        raise SchemeError(
            f"no weight can be quantized to {scheme}: what consists of vectors can only be read from a file"
        )
    if not scheme.encodable:
        words = " and ".join(COLUMNS[name] for name in scheme.columns if name != "perm")
        raise SchemeError(
            f"no weight can be quantized to {scheme}: {words} cannot be told from the weight alone; leave it out, or "
            "read planes from a file that has them"
        )
    if search == "hqq" and (problem := hqq_problem(scheme)):
        raise SchemeError(f"hqq optimises the zeros of blocks, and {problem}")
    if search in RULES:
        RULES[search](scheme)


def check_values(weight: Tensor, scheme: Scheme, search: ScaleSearch) -> None:
    """Refuse a weight for which the rule of a library would store an infinite scale.

    Only a weight with values that a scale in fp16 may not reach is tried out; then as much memory is needed as for
    quantizing it.

    Raises:
        SchemeError: as `quantize` does for this weight.
    """
    if search in RULES and magnitude(weight) > _SAFE:
        quantize(weight, scheme, search)


def _prepared(weight: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
    """The weight with its columns in the order in which planes hold them, which `perm` is set to.

    Until it is calibrated, the scale of static activations is 1.
    """
    if "input_scale" in planes:
        planes["input_scale"].fill_(1.0)
    if "perm" not in planes:
        return weight
    order = by_norm(weight)
    planes["perm"].copy_(order)
    return weight.index_select(1, order)


def _grid(weight: Tensor, scheme: Scheme, family: Family, search: ScaleSearch, planes: dict[str, Tensor]) -> Grid:
    """Fill in the planes of scales, float zeros and biases, and choose integer zeros."""
    if search == "hqq":
        return hqq(weight, scheme, family, planes)
    if scheme.outer is not None:
        return leveled(weight, scheme, family, search, planes)
    if scheme.zero in ("float", "bias"):
        return offset(weight, scheme, family, search, planes)
    if search == "minmax":
        search = "absmax"  # Blocks without an offset span 0 either way.
    if scheme.double:
        return _double(weight, scheme, family, search, planes)
    return _choose(weight, scheme, Search(family, scale_format(scheme, family.floor)), search, planes["scales"])


def _choose(weight: Tensor, scheme: Scheme, search: Search, name: ScaleSearch, scales: Tensor) -> Grid:
    """Fill in the scales, and choose the zeros, of every block."""
    element, zeros = scheme.spec, None
    if scheme.zero == "int":
        zeros = torch.empty(scales.shape, dtype=element.dtype or torch.uint8, device=scales.device)
    choose = search.absmax if name == "absmax" else search.least_squares
    for batch in batches(weight, scheme.block, budget(weight.device)):
        stored, zero = choose(batch)
        scales[batch.at] = stored.view(scales[batch.at].shape)
        if zeros is not None and zero is not None:
            codes = zero if element.dtype is not None else zero - element.low
            zeros[batch.at] = codes.to(zeros.dtype).view(zeros[batch.at].shape)
    if name == "absmax" and scales.is_floating_point() and scheme.block.flat and weight.numel() % scheme.block.columns:
        scales[-1:].clamp_(min=TINY)  # bitsandbytes stores no 0 for a last, shorter block, and for all others it does
    return Grid(scheme, Level(search.format, scales), zeros)


def _double(weight: Tensor, scheme: Scheme, family: Family, name: ScaleSearch, planes: dict[str, Tensor]) -> Grid:
    """Second-level scales and offset are those of the absmax scales, whatever the search.

    So every block has its absmax scale to fall back on in a least-squares search. With `absmax`, codes are chosen at
    the scales before they are rounded to 8 bits, as bitsandbytes does.
    """
    first = torch.empty(planes["scales"].shape, dtype=torch.float32, device=weight.device)
    absmax = _choose(weight, scheme, Search(family, Plain(torch.float32, 0.0, math.inf)), "absmax", first)
    fmt = double(first)
    planes["scale_scales"].copy_(fmt.scale_scales)
    planes["scale_offset"].copy_(fmt.offset)
    if name != "absmax":
        return _choose(weight, scheme, Search(family, fmt), name, planes["scales"])
    for start in range(0, len(first), budget(weight.device)):
        at = (slice(start, min(start + budget(weight.device), len(first))),)
        planes["scales"][at] = fmt.store(first[at], at)
    return absmax


def _encode(weight: Tensor, grid: Grid, family: Family, codes: Tensor) -> None:
    n, k = weight.shape
    element, block = grid.scheme.spec, grid.scheme.block
    for area in areas(n, k, budget(weight.device), alignment(grid.scheme)):
        r0, r1, c0, c1 = area
        scale = grid.scales.spread(grid.scheme, n, k, area)
        x = read(weight, area).view(r1 - r0, scale.shape[1], -1)
        bias = grid.bias(n, k, area)
        if bias is not None:
            x = x - bias
        t = x / bounded(scale) if family.divides else x * reciprocal(scale)
        if block.flat and (tail := n * k % block.columns):
            # bitsandbytes divides in a last, shorter block, where it multiplies by the reciprocal in all others.
            start = max(n * k - tail - (r0 * k + c0), 0)
            t.view(-1)[start:] = x.view(-1)[start:] / bounded(scale).expand(x.shape).reshape(-1)[start:]
        found = family.encode(t, grid.zero(family, n, k, area)).view(r1 - r0, c1 - c0)
        if element.dtype is not None:
            codes[r0:r1, c0:c1] = found
        else:
            codes[r0:r1, packed_columns(element, c0, c1)] = _packed(found, element)


def _packed(fields: Tensor, element: Element) -> Tensor:
    return pack_trits(fields) if element.trits else pack(fields, element.bits)
