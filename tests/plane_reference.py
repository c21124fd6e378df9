"""What planes mean, in float64 and bit by bit: the definitions of `Scheme` and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.scheme import SCALE_TYPES, Block, Scheme


def fields(packed: Tensor, bits: int, n: int) -> Tensor:
    """The unsigned fields of packed rows."""
    stream = ((packed.unsqueeze(-1).int() >> torch.arange(8)) & 1).flatten(-2)[..., : n * bits]
    return (stream.unflatten(-1, (n, bits)) << torch.arange(bits)).sum(-1)


def trits(packed: Tensor, n: int) -> Tensor:
    """The base-3 digits of packed rows."""
    return (packed.unsqueeze(-1).int() // 3 ** torch.arange(5) % 3).flatten(-2)[..., :n]


def owners(block: Block, n: int, k: int) -> Tensor:
    """`[n, k]`: the number of the block that each weight belongs to, counting along the rows of the grid."""
    i, j = torch.arange(n).unsqueeze(1), torch.arange(k).unsqueeze(0)
    if block.flat:
        return (i * k + j) // block.columns
    rows, columns = block.rows or n, block.columns or k
    return i // rows * math.ceil(k / columns) + j // columns


def first_level(plane: Tensor, name: str, columns: int) -> Tensor:
    """The numbers that a plane of scales or biases holds, without a second level."""
    kind = SCALE_TYPES[name]
    if kind.kind == "power":
        return torch.exp2(plane.double() - 127)
    if kind.pattern is not None:
        return plane.view(kind.pattern).double()
    if kind.dtype is not None:
        return plane.double()
    return kind.low + kind.step * fields(plane, kind.bits, columns).double()


def spread(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int, name: str, outer: str) -> Tensor:
    """`[n, k]`: the scale, bias or float zero of each weight."""
    grid = scheme.block.grid(n, k)
    values = first_level(planes[name], scheme.scale, grid[-1]).flatten()[owners(scheme.block, n, k)]
    if scheme.outer is None or not outer:
        return values
    return values * planes[outer].double().flatten()[owners(scheme.outer.block, n, k)]


def codes(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int, name: str = "codes") -> Tensor:
    """Integers, or places in a table."""
    spec = scheme.spec
    if spec.dtype is not None:
        return planes[name].long()
    found = trits(planes[name], k) if spec.trits else fields(planes[name], spec.bits, k)
    return found + spec.low


def values(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """What codes stand for before anything else."""
    spec = scheme.spec
    if spec.float_dtype is not None:
        return planes["codes"].view(spec.float_dtype).double()
    found = codes(planes, scheme, n, k)
    return torch.tensor(spec.values).double()[found] if spec.kind == "table" else found.double()


def parts(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[n, k]` each: scale, zero, bias."""
    scale = spread(planes, scheme, n, k, "scales", "scale_scales")
    zero = bias = torch.zeros(n, k, dtype=torch.float64)
    if scheme.zero == "int":
        grid = scheme.block.grid(n, k)
        zero = codes(planes, scheme, -1, grid[-1], "zeros").double().flatten()[owners(scheme.block, n, k)]
    elif scheme.zero == "float":
        zero = spread(planes, scheme, n, k, "zeros", "")
    elif scheme.zero == "bias":
        bias = spread(planes, scheme, n, k, "biases", "bias_scales")
    return scale, zero, bias


def decoded(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """The weight, with its columns as planes have them."""
    scale, zero, bias = parts(planes, scheme, n, k)
    return (values(planes, scheme, n, k) - zero) * scale + bias


def levels(scheme: Scheme) -> Tensor:
    """All values that a code can stand for."""
    spec = scheme.spec
    if spec.kind == "table":
        return torch.tensor(spec.values).double()
    if spec.float_dtype is not None:
        all_values = torch.arange(256, dtype=torch.uint8).view(spec.float_dtype).double()
        return all_values[all_values.isfinite()]
    return torch.arange(spec.low, spec.high + 1).double()


def assert_nearest(weight: Tensor, planes: dict[str, Tensor], scheme: Scheme) -> None:
    """Every code is the nearest one to its weight, at scale, zero and bias as they are stored."""
    n, k = weight.shape
    scale, zero, bias = parts(planes, scheme, n, k)
    w = weight.double()
    reach = (levels(scheme) - zero.unsqueeze(-1)) * scale.unsqueeze(-1) + bias.unsqueeze(-1)
    best = (w.unsqueeze(-1) - reach).abs().amin(-1)
    slack = 1e-5 * scale.abs() * scheme.spec.bound + 1e-6 * (w.abs() + bias.abs() + (zero * scale).abs()) + 1e-37
    assert ((w - decoded(planes, scheme, n, k)).abs() <= best + slack).all()


def block_errors(weight: Tensor, planes: dict[str, Tensor], scheme: Scheme, block: Block) -> tuple[Tensor, Tensor]:
    """Squared error and squared norm of each block."""
    n, k = weight.shape
    error = (weight.double() - decoded(planes, scheme, n, k)).square().flatten()
    owner, sums = owners(block, n, k).flatten(), torch.zeros(math.prod(block.grid(n, k)), dtype=torch.float64)
    return sums.index_add(0, owner, error), sums.index_add(0, owner, weight.double().square().flatten())
