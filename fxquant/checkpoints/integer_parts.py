"""Planes of integers as unsigned fields, with scales and zero points of single rows: the inverse of `integers`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.bits import unpack, unpack_trits
from fxquant.checkpoints.target import Target, group_of
from fxquant.scheme import Element, Scheme

_PIECE, _ROWS = 1 << 22, 8
"""Fields that are unpacked at a time, and what the number of their rows is a multiple of: words of AWQ hold as many."""


def of_fields(target: Target, bits: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the codes of a weight, some rows at a time: they take up to eight times as much memory.

    Args:
        target: planes of an element of integers with at most `bits` bits, without a zero point or with integers.
        bits: of a field. The middle of the range is the zero of symmetric codes, those too that are narrower.
        function: takes fields, uint8 `[rows, K]` below `2**bits`, columns in the order of the planes, and gives rows.
    """
    spec = target.scheme.spec
    offset = (1 << (bits - 1)) + spec.low if target.scheme.zero == "none" else 0
    step = max(_PIECE // target.k // _ROWS, 1) * _ROWS
    parts = target.planes["codes"].split(step)
    made = [function(_fields(part, spec, target.k).add_(offset)) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made)


def scales_and_zeros(target: Target, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Scales, and zero points as fields, uint8: of single rows, `[N, G]`.

    Args:
        target: as for `of_fields`.
        bits: of a field.
        group: columns that share a scale in the file; None: those that do in the planes.
    """
    scales = target.scales(group)
    if target.scheme.zero == "none":
        return scales, torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8, device=scales.device)
    grid = target.scheme.block.grid(target.n, target.k)
    stored = _fields(target.planes["zeros"], target.scheme.spec, grid[-1])
    return scales, target.by_row(stored.view(grid), group)


def integer_obstacles(scheme: Scheme, n: int, k: int, bits: tuple[int, ...], perm: bool = False) -> list[str]:
    """What keeps a format of integers, in groups along K, from holding the codes and blocks of a scheme.

    Args:
        scheme: of the weight.
        n: output features.
        k: input features.
        bits: how many a code can have.
        perm: whether groups can consist of any columns.
    """
    spec, found = scheme.spec, []
    if spec.kind != "int" or not held_bits(spec, bits):
        found.append(f"integer codes of up to {max(bits)} bits, not {scheme.element}")
    if scheme.zero in ("float", "bias"):
        found.append(f"zero points within the range of the codes, not {_ZEROS[scheme.zero]}")
    if scheme.double or scheme.outer is not None:
        found.append("one level of scales")
    if group_of(scheme, n, k) is None:
        found.append(f"groups that are equal parts of a row of K={k}, not {scheme.block}")
    if set(scheme.columns) - ({"perm"} if perm else set()):
        found.append(f"no columns that are {' or '.join(_COLUMNS[name] for name in scheme.columns)}")
    return found


def held_bits(spec: Element, bits: tuple[int, ...]) -> int:
    """The narrowest field that holds every code of an integer element; 0: there is none."""
    return next((size for size in sorted(bits) if size >= spec.bits), 0)


_ZEROS = {"float": "floats", "bias": "biases"}
_COLUMNS = {"perm": "permuted", "scale": "scaled", "bias": "shifted"}


def _fields(plane: Tensor, spec: Element, columns: int) -> Tensor:
    """Codes counted from the lowest, uint8 `[rows, columns]`: a tensor of its own."""
    if spec.trits:
        return unpack_trits(plane, columns)
    if spec.dtype is None:
        return unpack(plane, spec.bits, columns)
    return (plane.to(torch.int16) - spec.low).to(torch.uint8)
