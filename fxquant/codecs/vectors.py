"""Elements whose codes name vectors in codebooks: GGUF's IQ types, AQLM, VPTQ. They can be read, not made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import unpack_wide
from fxquant.codecs.blocks import Area
from fxquant.scheme import Element


def decode_vectors(planes: Mapping[str, Tensor], spec: Element, k: int, area: Area) -> Tensor:
    """The values of an area before scales: sums of codebook entries, with their signs.

    Args:
        planes: `codes`, `codebook0`, ... and `signs` where there are any, as `Scheme.planes` has them.
        spec: a vector element.
        k: columns of the weight.
        area: starts at a multiple of 8 vectors; its rows may cut vectors.

    Returns:
        float32 `[rows, columns]`.
    """
    vectors = spec.vectors
    assert vectors is not None
    r0, r1, c0, c1 = area
    top, bottom = r0 // vectors.rows, -(-r1 // vectors.rows)
    left, right = c0 // vectors.columns, -(-c1 // vectors.columns)
    codes = unpack_wide(planes["codes"][top:bottom, spec.packed(left) : spec.packed(right)], spec.bits, right - left)
    per_group = -(-k // vectors.columns) // vectors.groups
    group = torch.arange(left, right, device=codes.device) // max(per_group, 1)
    total = torch.zeros((), device=codes.device)
    for i, bits in enumerate(vectors.books):
        book = planes[f"codebook{i}"]
        entries = (codes & ((1 << bits) - 1)) + (group << bits)
        codes = codes >> bits
        total = total + book.flatten(0, 1)[entries].to(torch.float32)
    values = total.permute(0, 2, 1, 3).reshape((bottom - top) * vectors.rows, -1)
    values = values[r0 - top * vectors.rows : r1 - top * vectors.rows, : c1 - c0]
    return values * _signs(planes["signs"], vectors.signs, area) if vectors.signs else values.contiguous()


def _signs(plane: Tensor, bits: int, area: Area) -> Tensor:
    """1 and -1 for every weight of an area; with 7 bits the eighth makes the number of minus signs even."""
    r0, r1, c0, c1 = area
    groups = -(-c1 // 8) - c0 // 8
    start = c0 // 8 * bits // 8
    fields = unpack_wide(plane[r0:r1, start : start + -(-groups * bits // 8)], bits, groups)
    each = (fields.unsqueeze(-1) >> torch.arange(8, device=plane.device)) & 1
    if bits == 7:
        each[..., 7] = each[..., :7].sum(-1) & 1
    return (1 - 2 * each).flatten(1)[:, : c1 - c0].to(torch.float32)
