"""Between float weights and planes, for every scheme: quantize, dequantize, and the error between the two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fxquant.bits import pack, unpack
from fxquant.codecs.blocks import Area, areas, batches, budget, read, spread
from fxquant.codecs.family import TINY, Family, bounded, reciprocal
from fxquant.codecs.floats import Floats
from fxquant.codecs.integers import Integers
from fxquant.codecs.scales import Plain, ScaleFormat, double, plain, scale_format
from fxquant.codecs.search import Search
from fxquant.codecs.tables import Tables
from fxquant.errors import SchemeError, nearest
from fxquant.scheme import Element, Scheme

ScaleSearch = Literal["absmax", "least_squares"]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = get_args(ScaleSearch)


@torch.no_grad()
def quantize(
    weight: Tensor,
    scheme: Scheme,
    search: ScaleSearch = "least_squares",
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The planes that hold a weight under a scheme.

    Codes are the nearest ones to the weight at the scales as they are stored. Memory beyond the weight and the planes
    stays bounded, whatever their size, except for what grows with the number of blocks: one float32 per block under
    double quantization, one byte per block where zeros are packed.

    Args:
        weight: `[N, K]`, any float dtype and strides, finite (see `all_finite`), on any device.
        scheme: how to store it.
        search: `absmax` takes the scale that spans the range of a block: torchao's affine primitives for integers,
            bitsandbytes' rule for nf4 and fp4 (bit-identical to its CPU functions), absmax / 448 for fp8.
            `least_squares` takes the scale (and zero) with the least squared error that a search finds, which is never
            more than that of `absmax`; scales of signed integers may be negative then.
        out: planes to write to, as `scheme.planes(N, K)` says; they may be strided. New ones by default.

    Returns:
        Planes by name, in the order of `scheme.planes(N, K)`; on the meta device, empty ones.

    Raises:
        SchemeError: when the scheme cannot hold the weight, `out` are not its planes, or there is no such search.
    """
    if search not in SCALE_SEARCHES:
        raise SchemeError(
            f"no scale search is called {search!r}{nearest(search, SCALE_SEARCHES)}\n"
            f"  scale searches: {', '.join(SCALE_SEARCHES)}"
        )
    planes = _planes(weight, scheme, out)
    if weight.is_meta or not weight.numel():
        return planes
    family = _family(scheme, weight.device)
    if scheme.double:
        grid = _double(weight, scheme, family, search, planes)
    else:
        grid = _choose(weight, scheme, Search(family, plain(scheme, family.floor)), search, planes["scales"])
    if grid.zeros is not None:
        zeros = grid.zeros.view(-1, grid.zeros.shape[-1])
        planes["zeros"].copy_(zeros if scheme.spec.dtype is not None else pack(zeros, scheme.spec.bits))
    _encode(weight, grid, planes["codes"])
    return planes


def _family(scheme: Scheme, device: torch.device) -> Family:
    match scheme.spec.kind:
        case "int":
            return Integers(scheme.spec, scheme.zero == "int")
        case "table":
            return Tables(scheme.spec, device)
        case "float":
            return Floats(scheme.spec, device)


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


@dataclass(frozen=True)
class _Grid:
    """The scales and zeros of all blocks."""

    scheme: Scheme
    family: Family
    format: ScaleFormat
    scales: Tensor
    """As `format` stores them."""
    zeros: Tensor | None
    """As codes are, but never packed; in the shape of the scales."""

    def spread(self, n: int, k: int, area: Area) -> tuple[Tensor, Tensor | None]:
        """Float32 scales and zeros, to broadcast against an area."""
        zeros, block = self.zeros, self.scheme.block
        scale = spread(lambda at: self.format.load(self.scales[at], at), block, n, k, area)
        return scale, None if zeros is None else spread(lambda at: self.family.decode(zeros[at]), block, n, k, area)


def _choose(weight: Tensor, scheme: Scheme, search: Search, name: ScaleSearch, scales: Tensor) -> _Grid:
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
    if name == "absmax" and scheme.block.flat and weight.numel() % scheme.block.columns:
        scales[-1:].clamp_(min=TINY)  # bitsandbytes stores no 0 for a last, shorter block, and for all others it does
    return _Grid(scheme, search.family, search.format, scales, zeros)


def _double(weight: Tensor, scheme: Scheme, family: Family, name: ScaleSearch, planes: dict[str, Tensor]) -> _Grid:
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


def _encode(weight: Tensor, grid: _Grid, codes: Tensor) -> None:
    n, k = weight.shape
    element, block = grid.scheme.spec, grid.scheme.block
    for area in areas(n, k, budget(weight.device)):
        r0, r1, c0, c1 = area
        scale, zero = grid.spread(n, k, area)
        x = read(weight, area).view(r1 - r0, scale.shape[1], -1)
        t = x / scale if grid.family.divides else x * reciprocal(scale)
        if block.flat and (tail := n * k % block.columns):
            # bitsandbytes divides in a last, shorter block, where it multiplies by the reciprocal in all others.
            start = max(n * k - tail - (r0 * k + c0), 0)
            t.view(-1)[start:] = x.view(-1)[start:] / bounded(scale).expand(x.shape).reshape(-1)[start:]
        found = grid.family.encode(t, zero).view(r1 - r0, c1 - c0)
        if element.dtype is not None:
            codes[r0:r1, c0:c1] = found
        else:
            codes[r0:r1, _bytes(c0, c1, element)] = pack(found, element.bits)


def _bytes(start: int, stop: int, element: Element) -> slice:
    return slice(start * element.bits // 8, math.ceil(stop * element.bits / 8))


def _decoded(codes: Tensor, grid: _Grid, n: int, k: int, area: Area) -> Tensor:
    """An area of the weight that the planes hold, float32."""
    r0, r1, c0, c1 = area
    element = grid.scheme.spec
    scale, zero = grid.spread(n, k, area)
    if element.dtype is not None:
        part = codes[r0:r1, c0:c1]
    else:
        part = unpack(codes[r0:r1, _bytes(c0, c1, element)], element.bits, c1 - c0)
    values = grid.family.decode(part).view(r1 - r0, scale.shape[1], -1)
    if zero is not None:
        values -= zero
    return values.mul_(scale).view(r1 - r0, c1 - c0)


def _grid(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int) -> _Grid:
    zeros, scales, element = planes.get("zeros"), planes["scales"], scheme.spec
    if zeros is not None:
        columns = scheme.block.grid(n, k)[-1]
        zeros = (zeros if element.dtype is not None else unpack(zeros, element.bits, columns)).reshape(scales.shape)
    return _Grid(scheme, _family(scheme, scales.device), scale_format(scheme, planes), scales, zeros)


@torch.no_grad()
def dequantize(
    planes: Mapping[str, Tensor],
    scheme: Scheme,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The weight that planes hold: `(code - zero) * scale`, `table[code] * scale` or `float(code) * scale`.

    Computed in float32, in this order, and then rounded to `dtype`.

    Args:
        planes: as `quantize` gives them.
        scheme: what they were made under.
        n: rows of the whole weight.
        k: columns of the weight.
        dtype: of the result.
        rows: first and last (exclusive) row to give; all by default.

    Returns:
        `[N, K]` or the rows of it, on the device of the planes.
    """
    first, last = rows or (0, n)
    out = torch.empty((last - first, k), dtype=dtype, device=planes["codes"].device)
    if out.is_meta or not out.numel():
        return out
    grid = _grid(planes, scheme, n, k)
    for r0, r1, c0, c1 in areas(last - first, k, budget(out.device)):
        out[r0:r1, c0:c1] = _decoded(planes["codes"], grid, n, k, (first + r0, first + r1, c0, c1))
    return out


@torch.no_grad()
def squared_error(weight: Tensor, planes: Mapping[str, Tensor], scheme: Scheme) -> float:
    """`||W - W'||^2 / ||W||^2` for the weight `W'` that the planes hold; 0 where the weight is all zeros.

    Summed in float64, without a second copy of the weight.
    """
    n, k = weight.shape
    grid = _grid(planes, scheme, n, k)
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for area in areas(n, k, budget(weight.device)):
        r0, r1, c0, c1 = area
        w = weight[r0:r1, c0:c1].to(torch.float64)
        difference = w - _decoded(planes["codes"], grid, n, k, area)
        sums += torch.stack([torch.linalg.vector_norm(x) for x in (difference, w)]).square_()
    error, norm = sums.tolist()
    return error / norm if norm else 0.0


@torch.no_grad()
def all_finite(weight: Tensor) -> bool:
    """Whether a weight of any shape holds no inf and no nan. Makes no copy of it, not even of one byte per weight.

    A weight on the meta device has no values, and so none that is not finite.
    """
    if weight.is_meta or not weight.numel():
        return True
    if weight.ndim > 2:
        return all(all_finite(part) for part in weight)
    rows = torch.atleast_2d(weight)
    n, k = rows.shape
    parts = [rows[r0:r1, c0:c1] for r0, r1, c0, c1 in areas(n, k, budget(weight.device))]
    extremes = torch.stack([value for part in parts for value in (part.amin(), part.amax())])
    return bool(extremes.isfinite().all())
