"""From planes to float weights, and how far these are from the weights that were quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant import native
from fxquant.bits import TRITS_PER_BYTE, unpack, unpack_trits
from fxquant.codecs.blocks import Area, areas, budget
from fxquant.codecs.family import Family
from fxquant.codecs.grid import Grid, family_of, grid_of
from fxquant.codecs.vectors import decode_vectors
from fxquant.scheme import Element, Scheme


@torch.no_grad()
def dequantize(
    planes: Mapping[str, Tensor],
    scheme: Scheme,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The weight that planes hold, as `Scheme` says: computed in float32, in that order, and then rounded to `dtype`.

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
    if native.dequantize(planes, scheme, n, k, first, out):
        return out
    decoder = Decoder(planes, scheme, n, k, grid_of(planes, scheme, n, k), family_of(scheme, out.device))
    for r0, r1, c0, c1 in areas(last - first, k, budget(out.device), alignment(scheme)):
        values, at = decoder.weights((first + r0, first + r1, c0, c1))
        out[r0:r1, at] = values.to(dtype)
    return out


@torch.no_grad()
def squared_error(weight: Tensor, planes: Mapping[str, Tensor], scheme: Scheme) -> float:
    """`||W - W'||^2 / ||W||^2` for the weight `W'` that the planes hold; 0 where the weight is all zeros.

    Summed in float64, without a second copy of the weight.
    """
    n, k = weight.shape
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    total = [0.0, 0.0]
    for area, values, at in _decoded(planes, scheme, n, k, weight.device):
        w = weight[area[0] : area[1], at]
        found = native.squares(values, w)
        if found is not None:
            total = [a + b for a, b in zip(total, found, strict=True)]
            continue
        # Both converted first: an operation on two dtypes is several times slower.
        w = w.to(torch.float64)
        off = values.to(torch.float64).sub_(w)
        sums += torch.stack([torch.linalg.vector_norm(x) for x in (off, w)]).square_()
    error, norm = (a + b for a, b in zip(total, sums.tolist(), strict=True))
    return error / norm if norm else 0.0


def _decoded(
    planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int, device: torch.device
) -> Iterator[tuple[Area, Tensor, Tensor | slice]]:
    """Areas, float32 weights of them, and the columns of the weight that they are."""
    size, start = budget(device), 0
    step = min(size // max(k, 1), n)
    buffer = torch.empty((step, k), device=device)
    while start < n and step:
        rows = buffer[: n - start]
        if not native.dequantize(planes, scheme, n, k, start, rows):
            break
        yield (start, start + len(rows), 0, k), rows, slice(None)
        start += step
    if start >= n:
        return
    decoder = Decoder(planes, scheme, n, k, grid_of(planes, scheme, n, k), family_of(scheme, device))
    for r0, r1, c0, c1 in areas(n - start, k, size, alignment(scheme)):
        area = (start + r0, start + r1, c0, c1)
        yield area, *decoder.weights(area)


@dataclass(frozen=True)
class Decoder:
    """Decodes areas of one weight."""

    planes: Mapping[str, Tensor]
    scheme: Scheme
    n: int
    k: int
    grid: Grid
    family: Family

    def weights(self, area: Area) -> tuple[Tensor, Tensor | slice]:
        """Float32 weights `[rows, columns]` of an area of the planes, and the columns of the weight that they are."""
        values, (_, _, c0, c1) = self._values(area), area
        at = self.planes["perm"][c0:c1].to(torch.int64) if "perm" in self.scheme.columns else slice(c0, c1)
        if "scale" in self.scheme.columns:
            values.mul_(self.planes["column_scales"][at])
        if "bias" in self.scheme.columns:
            values.add_(self.planes["column_biases"][at])
        return values, at

    def _values(self, area: Area) -> Tensor:
        r0, r1, c0, c1 = area
        scale = self.grid.scales.spread(self.scheme, self.n, self.k, area)
        if self.scheme.spec.vectors is not None:
            values = decode_vectors(self.planes, self.scheme.spec, self.k, area)
        else:
            values = self.family.decode(read_codes(self.planes["codes"], self.scheme.spec, area))
        values = values.view(r1 - r0, scale.shape[1], -1)
        zero = self.grid.zero(self.family, self.n, self.k, area)
        if zero is not None:
            values -= zero
        values *= scale
        bias = self.grid.bias(self.n, self.k, area)
        if bias is not None:
            values += bias
        return values.view(r1 - r0, c1 - c0)


def alignment(scheme: Scheme) -> int:
    """Areas of a row start at multiples of so many columns: whole bytes of codes and signs, whole vectors."""
    if scheme.spec.trits:
        return 8 * TRITS_PER_BYTE
    return 8 * (scheme.spec.vectors.columns if scheme.spec.vectors else 1)


def read_codes(codes: Tensor, spec: Element, area: Area) -> Tensor:
    """The codes of an area, one each: in their own dtype, or the unsigned fields in uint8."""
    r0, r1, c0, c1 = area
    if spec.dtype is not None:
        return codes[r0:r1, c0:c1]
    part = codes[r0:r1, packed_columns(spec, c0, c1)]
    return unpack_trits(part, c1 - c0) if spec.trits else unpack(part, spec.bits, c1 - c0)


def packed_columns(spec: Element, start: int, stop: int) -> slice:
    """The bytes of a row that hold these columns; `start` is as `alignment` demands."""
    return slice(spec.packed(start), spec.packed(stop))
