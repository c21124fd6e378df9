"""Which type of GGUF holds the planes of a scheme as they are, and its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fxquant.checkpoints import gguf_of_planes
from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.errors import CheckpointError
from fxquant.scheme import Scheme

_PER_BLOCK = ("scales", "biases")
_LARGEST_UE4M3 = 0x7E


def gguf_type(scheme: Scheme) -> str | None:
    """The type whose blocks hold every weight of a scheme exactly; None where there is none.

    Blocks of the scheme may consist of several of GGUF's, which then all get its scale: `int8-row-fp16` is Q8_0, and
    `int4-g128-fp16` is Q4_0. What the scheme does with activations has no place in a file, and is left out.

    Args:
        scheme: of a weight.

    Returns:
        A key of `fxquant.checkpoints.gguf_layouts.LAYOUTS`. K has to be a multiple of its block.
    """
    weight = scheme.weight_only
    schemes = {name: Scheme.parse(layout.scheme) for name, layout in LAYOUTS.items()}
    same = next((name for name, own in schemes.items() if own == weight), None)
    return same or next((name for name, own in schemes.items() if _consists_of(weight, own)), None)


def _consists_of(scheme: Scheme, own: Scheme) -> bool:
    return own.outer is None and own.block.divides(scheme.block) and replace(scheme, block=own.block) == own


def gguf_rows(planes: Mapping[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """The blocks of the type of a scheme that its planes are.

    Args:
        planes: as `scheme.planes(n, k)` has them. The second level of `nvfp4` is left out: GGUF has it in a tensor of
            its own.
        scheme: one that `gguf_type` has a type for.
        n: rows.
        k: weights of a row; a multiple of the type's block.

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        CheckpointError: there is no such type, or it cannot hold these planes.
    """
    name = gguf_type(scheme)
    if name is None or k % LAYOUTS[name].size:
        raise CheckpointError(f"GGUF has no type for a {scheme} weight of shape [N={n}, K={k}]")
    own = Scheme.parse(LAYOUTS[name].scheme)
    if name == "NVFP4" and bool((planes["scales"] > _LARGEST_UE4M3).any()):
        raise CheckpointError(
            f"{scheme} weight of shape [N={n}, K={k}]: some scales are negative or no number, and GGUF's have no sign\n"
            "  quantize it to q4_k, say"
        )
    return gguf_of_planes(_spread(planes, scheme, own, n, k), own)


def _spread(planes: Mapping[str, Tensor], scheme: Scheme, own: Scheme, n: int, k: int) -> dict[str, Tensor]:
    """Planes with a scale for each block of the type: each of the scheme's as often as its block has of them."""
    found = {name: planes[name] for name in own.planes(n, k)}
    if scheme.block == own.block:
        return found
    rows = scheme.block.rows or n
    columns = (scheme.block.columns or k) // own.block.columns or 1
    for name in _PER_BLOCK:
        if name in found:
            wide = found[name].repeat_interleave(columns, 1)[:, : k // own.block.columns]
            found[name] = wide.repeat_interleave(rows, 0)[:n]
    return found
