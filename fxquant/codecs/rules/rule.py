"""What a rule is, and how it fills the planes of a weight: values per block first, then the codes at these values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.bits import pack, pack_trits
from fxquant.codecs.blocks import Batch, areas, batches, budget, read, spread
from fxquant.codecs.decode import alignment, packed_columns
from fxquant.codecs.scales import pack_fields
from fxquant.codecs.search import extremes
from fxquant.errors import SchemeError
from fxquant.scheme import SCALE_TYPES, TENSOR, Block, Element, ScaleType, Scheme


@dataclass(frozen=True)
class Rule:
    """How one library quantizes one weight."""

    choose: Callable[[Batch], Mapping[str, Tensor]]
    """Values of each block, `[blocks]`: planes by name (not packed, zeros as the integers that they are), and besides
    them whatever `encode` needs and no plane holds."""
    factors: tuple[str, ...]
    """Which of these values `encode` takes."""
    encode: Callable[..., Tensor]
    """`encode(x, *factors)`: codes of float32 weights, as the element stores them before packing. Factors broadcast."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Planes that hold one value for the whole weight."""


Make = Callable[[Tensor], Rule]
"""Makes the rule for a weight: libraries calculate in the dtype of the weight, and some look at all of it first."""


def fill(make: Make, library: str, weight: Tensor, scheme: Scheme, planes: Mapping[str, Tensor]) -> None:
    """Quantize as the library does. A few numbers per block are all that is kept beyond the weight and the planes.

    Args:
        make: from `RULES`, for this scheme.
        library: its name there.
        weight: `[N, K]`, any float dtype and strides, finite; neither empty nor on the meta device.
        scheme: how to store it.
        planes: of the scheme, to write to.

    Raises:
        SchemeError: the library would store an infinite scale.
    """
    rule = make(weight)
    n, k = weight.shape
    chosen: dict[str, Tensor] = {}
    for batch in batches(weight, scheme.block, budget(weight.device)):
        for name, values in rule.choose(batch).items():
            if name not in chosen:
                chosen[name] = values.new_empty(scheme.block.grid(n, k))
            chosen[name][batch.at] = values.view(chosen[name][batch.at].shape)
    for name, values in (chosen | dict(rule.whole)).items():
        if name in planes:
            _store(values, name, library, scheme, planes[name])
    for area in areas(n, k, budget(weight.device), alignment(scheme)):
        factors = [_spread(chosen[name], scheme.block, n, k, area) for name in rule.factors]
        r0, r1, c0, c1 = area
        x = read(weight, area).view(r1 - r0, factors[0].shape[1], -1)
        _write(rule.encode(x, *factors).view(r1 - r0, c1 - c0), scheme.spec, area, planes["codes"])


def _spread(values: Tensor, block: Block, n: int, k: int, area: tuple[int, int, int, int]) -> Tensor:
    return spread(lambda at: values[at], block, n, k, area)


def _store(values: Tensor, name: str, library: str, scheme: Scheme, plane: Tensor) -> None:
    spec = scheme.spec
    if name == "zeros" and scheme.zero == "int":
        plane.copy_(values if spec.dtype is not None else pack(values.to(torch.int16) - spec.low, spec.bits))
        return
    kind = SCALE_TYPES[scheme.scale]
    if name in ("scales", "biases"):
        values = pack_fields(values, kind)
    if not bool(_finite(values, kind).all()):
        raise SchemeError(
            f"{library} has no finite scale in {scheme} for this weight: its magnitudes are too large for it\n"
            "  choose scales by least_squares or absmax, or store them in fp32"
        )
    plane.copy_(values)


def _finite(values: Tensor, kind: ScaleType) -> Tensor:
    if values.is_floating_point():
        return values.isfinite()
    return values != 255 if kind.kind == "power" else (values & 0x7F) != 0x7F


def _write(found: Tensor, element: Element, area: tuple[int, int, int, int], codes: Tensor) -> None:
    r0, r1, c0, c1 = area
    if element.dtype is not None:
        codes[r0:r1, c0:c1] = found
    else:
        packed = pack_trits(found) if element.trits else pack(found, element.bits)
        codes[r0:r1, packed_columns(element, c0, c1)] = packed


def no_rule(library: str, scheme: Scheme, schemes: str) -> SchemeError:
    """The error for a scheme that a library cannot quantize to."""
    return SchemeError(
        f"{library} has no rule for {scheme}\n  it has rules for {schemes}\n  choose scales by least_squares or absmax"
    )


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that libraries calculate in: that of the weight, and float32 for the few that they do not take."""
    return weight.dtype if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def absmax(batch: Batch) -> Tensor:
    """The largest magnitude of each block, float32."""
    low, high = extremes(batch)
    return torch.maximum(low.abs(), high)


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude of a whole weight, float32, no dimensions."""
    tops = [piece().abs().amax() for batch in batches(weight, TENSOR, budget(weight.device)) for piece in batch.pieces]
    return torch.stack(tops).amax()


def over(x: Tensor, divisor: float) -> Tensor:
    """`x / divisor`, rounded once: on a GPU torch divides by a number as it multiplies by its rounded reciprocal."""
    return x / x.new_tensor(divisor)


def stored_and_used(scale: Tensor, kind: ScaleType) -> tuple[Tensor, Tensor]:
    """The scale as the plane has it, and the one that codes are chosen at.

    These are equal, but a library goes on calculating in its own dtype where the plane holds all values of it.
    Where it does not, codes are chosen at what is stored, of which none is 0.
    """
    dtype = kind.dtype
    assert dtype is not None
    stored = scale.to(dtype)
    if torch.promote_types(scale.dtype, dtype) == dtype:
        return stored, scale
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    stored = torch.where((stored == 0) & (scale != 0), smallest, stored)
    return stored, stored
