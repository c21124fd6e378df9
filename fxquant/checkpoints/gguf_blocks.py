"""GGUF's block types, in both directions, except those that consist of vectors: see `gguf_grids` for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack, pack_trits, unpack, unpack_trits
from fxquant.checkpoints.gguf_grids import GRIDS, planes_of_grid
from fxquant.checkpoints.gguf_layouts import LAYOUTS, Layout, read, write
from fxquant.checkpoints.packing import in_pieces
from fxquant.checkpoints.source import Planes, Source
from fxquant.errors import CheckpointError, nearest
from fxquant.scheme import SCALE_TYPES, Element, Scheme

# TQ1_0's digits: bytes of five digits, and of four, in runs of so many bytes.
_TRIT_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
_LARGEST_UE4M3 = 0x7E
"""NVFP4's scales have no sign; 0x7f is nan."""


def planes_of_gguf(blocks: Tensor, type_name: str, n: int, k: int, *, scale: Tensor | None = None) -> Planes:
    """The planes of a weight in blocks of GGUF.

    Args:
        blocks: uint8 `[N, bytes of a row]`.
        type_name: as gguf calls it: a key of `LAYOUTS` or `GRIDS`.
        n: rows.
        k: weights of a row.
        scale: of NVFP4, the tensor `<name>.scale` of the file, one float; None: 1.

    Returns:
        The scheme of the same name, and its planes.

    Raises:
        CheckpointError: no such type, or blocks that are not of it.
    """
    source = Source(f"GGUF {type_name}", {"blocks": blocks, **({} if scale is None else {"scale": scale})}, n, k)
    if type_name in GRIDS:
        return planes_of_grid(source, type_name)
    if type_name not in LAYOUTS:
        known = [*LAYOUTS, *GRIDS]
        raise source.error(f"no such type{nearest(type_name, known)}", f"there are {', '.join(known)}")
    layout = LAYOUTS[type_name]
    source.require(k % layout.size == 0, f"K is no multiple of {layout.size}")
    rows = source.take("blocks", torch.uint8, (n, k // layout.size * layout.nbytes))
    parts = rows.view(n, -1, layout.nbytes)
    scheme = Scheme.parse(layout.scheme)
    planes = {"codes": _codes(parts, layout, scheme.spec)}
    for name, at in layout.halves.items():
        halves = parts[..., at : at + 2].contiguous().view(torch.int16).flatten(1)
        planes[name] = _negated(halves, name).view(torch.float16)
    if layout.scales:
        planes["scales"] = _stored(read(parts, layout.scales).flatten(1), scheme)
    if layout.minima:
        planes["biases"] = _stored(read(parts, layout.minima).flatten(1), scheme)
    if type_name == "NVFP4":
        source.require(bool((planes["scales"] <= _LARGEST_UE4M3).all()), "it has scales that are nan or negative")
        one = torch.ones(1, device=blocks.device)
        planes["scale_scales"] = (one if scale is None else source.scalar("scale")).view(1, 1)
    return source.finish(scheme, planes)


def gguf_of_planes(planes: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The blocks of GGUF that planes are: the inverse of `planes_of_gguf`, to the byte.

    Args:
        planes: as `Scheme.planes` has them. The second level of `nvfp4`, `scale_scales`, is left out: GGUF has it in
            a tensor of its own.
        scheme: one that has the name of a type in `LAYOUTS`.

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        CheckpointError: the scheme is not that of a type, or the planes are not its own.
    """
    layout = next((layout for layout in LAYOUTS.values() if Scheme.parse(layout.scheme) == scheme.weight_only), None)
    if layout is None:
        names = ", ".join(layout.scheme for layout in LAYOUTS.values())
        raise CheckpointError(f"GGUF has no type for {scheme}\n  it has {names}")
    n, k = _size(planes, scheme, layout)
    blocks = planes["codes"].new_zeros((n, k // layout.size, layout.nbytes), dtype=torch.uint8)
    _write_codes(blocks, layout, scheme.spec, planes["codes"], k)
    for name, at in layout.halves.items():
        halves = _negated(planes[name].contiguous().view(torch.int16), name)
        blocks[..., at : at + 2] = halves.view(torch.uint8).view(n, -1, 2)
    for name, parts in (("scales", layout.scales), ("biases", layout.minima)):
        if parts:
            write(blocks, parts, _fields(planes[name], scheme, k).view(n, k // layout.size, -1))
    return blocks.flatten(1)


def _size(planes: Mapping[str, Tensor], scheme: Scheme, layout: Layout) -> tuple[int, int]:
    """`[N, K]`, as the planes say that have one number for every block."""
    per_block = next(iter(layout.halves), "scales")
    found = {name: (tuple(plane.shape), plane.dtype) for name, plane in planes.items()}
    if per_block in planes and planes[per_block].ndim == 2:
        n, groups = planes[per_block].shape
        k = groups * (layout.size if layout.halves else scheme.block.columns)
        expected = {name: (spec.shape, spec.dtype) for name, spec in scheme.weight_only.planes(n, k).items()}
        if {name: found.get(name) for name in expected} == expected and k % layout.size == 0:
            return n, k
    raise CheckpointError(f"these are not the planes of a {scheme} weight: {found}")


def _codes(blocks: Tensor, layout: Layout, spec: Element) -> Tensor:
    if spec.trits:
        return pack_trits(_trits(blocks))
    fields = read(blocks, layout.codes).flatten(1)
    return fields.view(spec.dtype) if spec.dtype is not None else in_pieces(lambda part: pack(part, spec.bits), fields)


def _write_codes(blocks: Tensor, layout: Layout, spec: Element, codes: Tensor, k: int) -> None:
    shape = (*blocks.shape[:2], layout.size)
    if spec.trits:
        _write_trits(blocks, unpack_trits(codes, k).view(shape))
        return
    fields = (
        codes.contiguous().view(torch.uint8)
        if spec.dtype is not None
        else in_pieces(lambda part: unpack(part, spec.bits, k), codes)
    )
    write(blocks, layout.codes, fields.view(shape))


def _trits(blocks: Tensor) -> Tensor:
    """TQ1_0's digits, `[N, K]`: a byte is the fraction of 256 that they are behind the point, rounded up."""
    rows = []
    for at, count, digits in _TRIT_RUNS:
        octets = blocks[..., at : at + count].to(torch.int16)
        for digit in range(digits):
            rows.append(((octets * 3**digit) & 255) * 3 >> 8)
    return torch.cat(rows, -1).flatten(1)


def _write_trits(blocks: Tensor, digits: Tensor) -> None:
    start = 0
    for at, count, places in _TRIT_RUNS:
        run = digits[..., start : start + count * places].unflatten(-1, (places, count)).to(torch.int32)
        weights = torch.tensor([3 ** (4 - i) for i in range(places)], device=blocks.device, dtype=torch.int32)
        total = (run * weights.unsqueeze(-1)).sum(-2)
        blocks[..., at : at + count] = ((total * 256 + 242) // 243).to(torch.uint8)
        start += count * places


def _negated(halves: Tensor, name: str) -> Tensor:
    """float16 bits with the sign flipped where GGUF subtracts and planes add: of nan, too."""
    return halves ^ -32768 if name == "bias_scales" else halves


def _stored(fields: Tensor, scheme: Scheme) -> Tensor:
    """Small scales as their plane."""
    kind = SCALE_TYPES[scheme.scale]
    return fields.view(kind.dtype) if kind.dtype is not None else pack(fields, kind.bits)


def _fields(plane: Tensor, scheme: Scheme, k: int) -> Tensor:
    kind = SCALE_TYPES[scheme.scale]
    if kind.dtype is not None:
        return plane.contiguous().view(torch.uint8)
    return unpack(plane, kind.bits, math.ceil(k / scheme.block.columns))
