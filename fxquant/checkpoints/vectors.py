"""AQLM and VPTQ: codes that name vectors in learned codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack_wide, unpack_wide
from fxquant.checkpoints.packing import octets
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div, in_one_dtype
from fxquant.scheme import TENSOR, Block

_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)
_WIDEST_BOOK, _WIDEST_CODE = 20, 32


def planes_of_aqlm(tensors: Mapping[str, Tensor], n: int, k: int, *, bits: int) -> Planes:
    """The planes of an AQLM linear (arXiv 2401.06118, in the layout of aqlm 1.1).

    Args:
        tensors: `codes` `[N / rows, K / columns, books]`, whose lowest `bits` count; `codebooks`
            `[books, 2**bits, rows, columns]`, of which entries are added; `scales` `[N / rows, 1, 1, 1]`.
        n: output features.
        k: input features.
        bits: of an index into a book.

    Raises:
        CheckpointError: tensors that are not these, or codes of more than 32 bits.
    """
    source = Source("AQLM", tensors, n, k)
    source.require(1 <= bits <= _WIDEST_BOOK, f"indices have 1 to {_WIDEST_BOOK} bits, not {bits}")
    books = source.take("codebooks", FLOATS)
    source.require(books.ndim == 4 and min(books.shape) > 0, f"'codebooks' has shape {list(books.shape)}")
    count, entries, rows, columns = books.shape
    source.require(entries == 1 << bits, f"its books have {entries} entries for indices of {bits} bits")
    source.require(n % rows == 0 and k % columns == 0, f"it does not consist of vectors of {rows} x {columns} weights")
    _fits(source, bits * count)
    stored = source.take("codes", _CODES, (n // rows, k // columns, count)).to(torch.int64)
    scales = source.take("scales", FLOATS, (n // rows, 1, 1, 1)).view(-1, 1)
    scale, (scales, books) = in_one_dtype(scales, books)
    shifts = bits * torch.arange(count, device=stored.device)
    codes = ((stored & ((1 << bits) - 1)) << shifts).sum(-1)
    planes = {"codes": pack_wide(codes, bits * count), "scales": scales}
    planes |= {f"codebook{i}": book.unsqueeze(0) for i, book in enumerate(books)}
    scheme = source.scheme(element=_name([bits] * count, columns, rows), block=Block(rows, 0), scale=scale)
    return source.finish(scheme, planes)


def planes_of_vptq(
    tensors: Mapping[str, Tensor], n: int, k: int, *, vector_size: int, centroids: int, residual_centroids: int = 0
) -> Planes:
    """The planes of a VPTQ linear without outliers (arXiv 2409.17066, in the layout of vptq 0.0.5).

    Args:
        tensors: `indices` int32 `[groups, N / vector_size, words]`, a bit stream along K of both indices, the residual
            one above; `centroids.weight` `[groups, centroids * vector_size]` in any shape, `res_centroids.weight`
            likewise; `perm` int16 or uint16 `[K]`, if there; `weight_scale`, `weight_bias` `[K]`, if there.
        n: output features.
        k: input features.
        vector_size: rows that a vector has.
        centroids: entries of a book, a power of two.
        residual_centroids: entries of the second book; 0 (or less): there is none.

    Raises:
        CheckpointError: tensors that are not these, or outliers.
    """
    source = Source("VPTQ", tensors, n, k)
    outliers = sorted(name for name in tensors if name.startswith("outlier"))
    source.require(not outliers, f"it has outliers, {outliers}, which no scheme holds")
    sizes = [size for size in (centroids, residual_centroids) if size > 0]
    source.require(centroids > 1 and all(size & (size - 1) == 0 for size in sizes), f"books of {sizes} entries")
    source.require(vector_size > 0 and n % vector_size == 0, f"N is no multiple of the vector size {vector_size}")
    bits = [size.bit_length() - 1 for size in sizes]
    _fits(source, sum(bits))
    indices = source.take("indices", torch.int32)
    source.require(indices.ndim == 3 and k % max(len(indices), 1) == 0, f"'indices' has shape {list(indices.shape)}")
    groups = len(indices)
    per_group, width = k // max(groups, 1), sum(bits)
    indices = source.take("indices", torch.int32, (groups, n // vector_size, ceil_div(per_group * width, 32)))
    fields = unpack_wide(octets(indices)[..., : ceil_div(per_group * width, 8)], width, per_group)
    codes = pack_wide(fields.transpose(0, 1).flatten(1), width)
    names = ("centroids.weight", "res_centroids.weight")
    books = [_book(source, name, groups, size, vector_size) for name, size in zip(names, sizes, strict=False)]
    scale, books = in_one_dtype(*books)
    planes = {"codes": codes, "scales": books[0].new_ones((1, 1))} | {f"codebook{i}": b for i, b in enumerate(books)}
    columns = _columns(source, planes)
    element = _name(bits, 1, vector_size) + (f"c{groups}" if groups > 1 else "")
    return source.finish(source.scheme(element=element, block=TENSOR, scale=scale, columns=columns), planes)


def _fits(source: Source, bits: int) -> None:
    source.require(bits <= _WIDEST_CODE, f"codes of {bits} bits; {_WIDEST_CODE} can be read")


def _name(bits: list[int], columns: int, rows: int) -> str:
    return f"vq{'.'.join(map(str, bits))}x{columns}" + (f"r{rows}" if rows > 1 else "")


def _book(source: Source, name: str, groups: int, size: int, vector_size: int) -> Tensor:
    source.require(groups > 0, "'indices' is empty")
    book = source.take(name, FLOATS)
    wanted = (groups, size, vector_size, 1)
    source.require(
        book.numel() == math.prod(wanted), f"{name!r} has {book.numel()} numbers for books {list(wanted[:3])}"
    )
    return book.view(wanted)


def _columns(source: Source, planes: dict[str, Tensor]) -> tuple[str, ...]:
    """Put in what is done to columns."""
    k, columns = source.k, []
    if "perm" in source.tensors:
        perm = source.take("perm", (torch.int16, torch.uint16, torch.int32, torch.int64), (k,))
        perm = (perm.view(torch.uint16) if perm.dtype == torch.int16 else perm).to(torch.int64)
        natural = torch.arange(k, device=perm.device)
        source.require(torch.equal(perm.sort().values, natural), "'perm' is no permutation of the columns")
        columns.append("perm")
        planes["perm"] = perm.to(torch.int32)
    for name, kind, plane in (("weight_scale", "scale", "column_scales"), ("weight_bias", "bias", "column_biases")):
        if name in source.tensors:
            columns.append(kind)
            planes[plane] = source.take(name, FLOATS, (k,), (1, k), (k, 1)).to(torch.float32).view(k)
    return tuple(columns)
