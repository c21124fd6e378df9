"""Integer codes with scales per group along K, and what zero points they have: what most formats come to."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.checkpoints.packing import integer, plane_of
from fxquant.checkpoints.source import Planes, Source, in_one_dtype
from fxquant.scheme import Activation, Block


def affine(
    source: Source,
    fields: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor | None,
    block: Block,
    perm: Tensor | None = None,
    activation: Activation | None = None,
) -> Planes:
    """Planes of `(field - zero) * scale`, with an integer zero per group.

    Where every zero is the middle of the range, the code is signed and has no zero point: the same weights in fewer
    bytes, and what the producers call symmetric. Signed codes with zero points are the same as unsigned ones with them.

    Args:
        source: whose weight it is.
        fields: uint8 `[N, K]`, below `2**bits`; columns in the order of their groups.
        bits: 1 to 8.
        scales: `[N, G]`.
        zeros: uint8 `[N, G]`, below `2**bits`; None: the middle of the range.
        block: which weights share a scale.
        perm: int32 `[K]`, which column of the weight each column of `fields` is; None: the same one.
        activation: how the input is quantized.
    """
    symmetric = zeros is None or bool((zeros == 1 << (bits - 1)).all())
    scale, (scales,) = in_one_dtype(scales)
    planes = {"codes": plane_of(fields, bits, symmetric), "scales": scales}
    if zeros is not None and not symmetric:
        planes["zeros"] = plane_of(zeros, bits, False)
    if perm is not None:
        planes["perm"] = perm
    scheme = source.scheme(
        element=integer(bits, symmetric),
        block=block,
        scale=scale,
        zero="none" if symmetric else "int",
        columns=() if perm is None else ("perm",),
    )
    return source.finish(scheme, planes, activation)


def shifted(
    source: Source, fields: Tensor, bits: int, scales: Tensor, offsets: Tensor, block: Block, kind: str = "bias"
) -> Planes:
    """Planes of `field * scale + offset` (`bias`) or `(field - offset) * scale` (`float`).

    Args:
        source: whose weight it is.
        fields: uint8 `[N, K]`, below `2**bits`.
        bits: 1 to 8.
        scales: the grid of blocks.
        offsets: as scales.
        block: which weights share a scale.
        kind: of zero.
    """
    scale, (scales, offsets) = in_one_dtype(scales, offsets)
    scheme = source.scheme(element=integer(bits, False), block=block, scale=scale, zero=kind)
    name = "biases" if kind == "bias" else "zeros"
    return source.finish(scheme, {"codes": plane_of(fields, bits, False), "scales": scales, name: offsets})


def fields_of(source: Source, name: str, codes: Tensor, bits: int) -> Tensor:
    """Signed codes of so many bits in int8 as unsigned fields, counted from the lowest: uint8.

    Raises:
        CheckpointError: a code that does not fit.
    """
    half = 1 << (bits - 1)
    if bits < 8 and codes.numel():
        low, high = int(codes.min()), int(codes.max())
        source.require(-half <= low and high < half, f"{name!r} has codes from {low} to {high} in {bits} bits")
    return (codes.to(torch.int16) + half).to(torch.uint8)


def order(source: Source, g_idx: Tensor, group: int) -> Tensor | None:
    """The columns in the order of their groups, from the group of each column: act-order as a permutation.

    Args:
        source: whose weight it is.
        g_idx: int32 `[K]`.
        group: the size that every group has.

    Returns:
        int32 `[K]`, or None where groups stand in order: also where all of `g_idx` is 0 or -1, as in files that
        never set it.

    Raises:
        CheckpointError: a group that is not there, or one of another size.
    """
    groups = source.k // group
    natural = torch.arange(source.k, device=g_idx.device) // group
    unset = bool((g_idx == 0).all()) or bool((g_idx == -1).all())
    if unset or torch.equal(g_idx.to(torch.int64), natural):
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    source.require(low >= 0 and high < groups, f"'g_idx' names groups {low} to {high}, and there are {groups}")
    sizes = torch.bincount(g_idx.to(torch.int64), minlength=groups)
    source.require(
        bool((sizes == group).all()), f"'g_idx' gives groups other sizes than {group}: {sizes.tolist()[:16]}"
    )
    return torch.argsort(g_idx, stable=True).to(torch.int32)
