"""GGUF's IQ1, IQ2 and IQ3: eight or four weights at a time out of a grid of points, with signs. They can be read only.

Powers of two in the formula of a type go into its codebook, and so does the shift of IQ1 by an eighth up or down, as
the highest bit of the index: what is left is `sign * entry * odd number * d` for all types.

Layouts: https://github.com/ggml-org/llama.cpp/blob/b4000/ggml/src/ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fxquant.bits import pack, pack_wide
from fxquant.checkpoints.gguf_layouts import Part, read
from fxquant.checkpoints.packing import in_pieces
from fxquant.checkpoints.source import Planes, Source
from fxquant.scheme import SCALE_TYPES, Scheme

_SIZE = 256
_PIECE = 1 << 20  # `pack_wide` takes eight bytes for a bit while it is at work
_NIBBLES, _PAIRS, _BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))


@dataclass(frozen=True)
class Points:
    """What a block says: all but `d` as fields, `[N, blocks, ...]`."""

    indices: Tensor
    scales: Tensor
    d: Tensor
    """float16 bits, as bytes `[N, blocks, 2]`."""
    signs: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """One type."""

    nbytes: int
    factor: float
    """What entries of the grid are multiplied with."""
    points: Callable[[Tensor], Points]


def planes_of_grid(source: Source, type_name: str) -> Planes:
    """The planes of a weight in blocks of a type in `GRIDS`.

    Raises:
        CheckpointError: blocks that are not of it, or the package gguf, which has the grids, is not there.
    """
    grid = GRIDS[type_name]
    source.require(source.k % _SIZE == 0, f"K is no multiple of {_SIZE}")
    rows = source.take("blocks", torch.uint8, (source.n, source.k // _SIZE * grid.nbytes))
    points = grid.points(rows.view(source.n, -1, grid.nbytes))
    scheme = Scheme.parse(type_name.lower())
    bits, vectors, kind = scheme.spec.bits, scheme.spec.vectors, SCALE_TYPES[scheme.scale]
    assert vectors is not None
    planes = {"codes": in_pieces(lambda part: pack_wide(part, bits), points.indices.flatten(1), _PIECE)}
    if points.signs is not None:
        planes["signs"] = in_pieces(functools.partial(pack, bits=vectors.signs), points.signs.flatten(1))
    book = _book(source, type_name) * grid.factor
    planes["codebook0"] = book.to(torch.float16).view(1, -1, 1, vectors.columns).to(rows.device)
    planes["scales"] = pack(points.scales.flatten(1), kind.bits)
    planes["scale_scales"] = points.d.contiguous().view(torch.float16).flatten(1)
    return source.finish(scheme, planes)


def _book(source: Source, type_name: str) -> Tensor:
    try:
        return _grid(type_name)
    except ImportError:
        raise source.error("its grid comes with the package gguf, which is not there", "pip install gguf") from None


@functools.lru_cache(maxsize=8)
def _grid(type_name: str) -> Tensor:
    """The points of a type, float32 `[entries, 4 or 8]`; of IQ1 once up and once down."""
    from gguf import quants

    quant = getattr(quants, "IQ1_S" if type_name == "IQ1_M" else type_name)
    quant.init_grid()
    grid = torch.from_numpy(quant.grid.reshape(quant.grid_shape).copy())
    return torch.cat((grid + 0.125, grid - 0.125)) if type_name.startswith("IQ1") else grid


def _words(octets: Tensor, size: int) -> Tensor:
    """Little-endian words of `size` bytes as int64."""
    parts = octets.unflatten(-1, (-1, size)).to(torch.int64)
    words: Tensor = (parts << (8 * torch.arange(size, device=octets.device))).sum(-1)
    return words


def _bits(words: Tensor, shifts: tuple[int, ...], bits: int) -> Tensor:
    """Fields at these shifts of words, `[..., words * shifts]`."""
    fields = (words.unsqueeze(-1) >> torch.tensor(shifts, device=words.device)) & ((1 << bits) - 1)
    return fields.flatten(-2)


def _small(fields: Tensor) -> Tensor:
    return fields.to(torch.uint8)


def _iq2_xxs(b: Tensor) -> Points:
    pairs = b[..., 2:66].unflatten(-1, (-1, 8))
    words = _words(pairs[..., 4:].flatten(-2), 4)
    return Points(pairs[..., :4].flatten(-2), _small(words >> 28), b[..., :2], _small(_bits(words, (0, 7, 14, 21), 7)))


def _iq2_xs(b: Tensor) -> Points:
    words = _words(b[..., 2:66], 2)
    return Points(words & 511, read(b, (Part(66, 8, _NIBBLES, 4),)), b[..., :2], _small(words >> 9))


def _iq2_s(b: Tensor) -> Points:
    high = read(b, (Part(66, 8, _PAIRS, 2),)).to(torch.int64)
    indices = b[..., 2:34].to(torch.int64) | high << 8
    return Points(indices, read(b, (Part(74, 8, _NIBBLES, 4),)), b[..., :2], b[..., 34:66])


def _iq3_xxs(b: Tensor) -> Points:
    words = _words(b[..., 66:98], 4)
    return Points(b[..., 2:66], _small(words >> 28), b[..., :2], _small(_bits(words, (0, 7, 14, 21), 7)))


def _iq3_s(b: Tensor) -> Points:
    high = read(b, (Part(66, 8, _BITS, 1),)).to(torch.int64)
    indices = b[..., 2:66].to(torch.int64) | high << 8
    return Points(indices, read(b, (Part(106, 4, _NIBBLES, 4),)), b[..., :2], b[..., 74:106])


def _iq1_s(b: Tensor) -> Points:
    words = _words(b[..., 34:50], 2)
    down = (words >> 15).repeat_interleave(4, -1)
    indices = b[..., 2:34].to(torch.int64) | _bits(words, (0, 3, 6, 9), 3) << 8 | down << 11
    return Points(indices, _small(words >> 12 & 7), b[..., :2])


def _iq1_m(b: Tensor) -> Points:
    words = _words(b[..., 48:56], 2)
    # `d` is in the highest four bits of each of the four words.
    d = ((words >> 12) << (4 * torch.arange(4, device=b.device))).sum(-1)
    octets = torch.stack((d & 255, d >> 8), -1).to(torch.uint8)
    high = read(b, (Part(32, 16, _NIBBLES, 4),)).to(torch.int64)
    return Points(b[..., :32].to(torch.int64) | high << 8, _small(_bits(words, (0, 3, 6, 9), 3)), octets)


GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        "IQ1_S": Grid(50, 1.0, _iq1_s),
        "IQ1_M": Grid(56, 1.0, _iq1_m),
        "IQ2_XXS": Grid(66, 1 / 8, _iq2_xxs),
        "IQ2_XS": Grid(74, 1 / 8, _iq2_xs),
        "IQ2_S": Grid(82, 1 / 8, _iq2_s),
        "IQ3_XXS": Grid(98, 1 / 4, _iq3_xxs),
        "IQ3_S": Grid(110, 1.0, _iq3_s),
    }
)
"""By the name that gguf has for the type."""
