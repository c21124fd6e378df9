"""What the units of all formats are made of: tensors of one matrix under its name, and tensors as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Contents, Reader, Unit
from fxquant.checkpoints.target import Written
from fxquant.scheme import PlaneSpec, Scheme

TensorsOf = Callable[[Scheme, Mapping[str, Tensor], int, int], Written]


def all_units(contents: Contents, tensors_of: TensorsOf) -> Iterator[Unit]:
    """One unit for each matrix, with the tensors `<name>.<suffix>`, and one for each tensor that stays as it is.

    Args:
        contents: of the checkpoint.
        tensors_of: what a format makes of planes; of those on the meta device, too.
    """
    specs = functools.cache(functools.partial(specs_of, tensors_of))
    for name, matrix in contents.matrices.items():
        behind = specs(matrix.scheme, matrix.n, matrix.k)
        make = functools.partial(_matrix, name, matrix.scheme, matrix.n, matrix.k, tensors_of)
        yield Unit((name,), {f"{name}.{suffix}": spec for suffix, spec in behind.items()}, make)
    yield from plain_units(contents)


def plain_units(contents: Contents) -> Iterator[Unit]:
    """One unit for each tensor that stays as it is."""
    for name, spec in contents.plain.items():
        yield Unit((name,), {name: spec}, functools.partial(_plain, name))


def specs_of(tensors_of: TensorsOf, scheme: Scheme, n: int, k: int) -> dict[str, PlaneSpec]:
    """Shapes and dtypes of what `tensors_of` gives."""
    planes = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in scheme.planes(n, k).items()
    }
    made = tensors_of(scheme, planes, n, k)
    return {suffix: PlaneSpec(tuple(tensor.shape), tensor.dtype) for suffix, tensor in made.items()}


def _matrix(name: str, scheme: Scheme, n: int, k: int, tensors_of: TensorsOf, reader: Reader) -> dict[str, Tensor]:
    made = tensors_of(scheme, reader.planes(name), n, k)
    return {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}


def _plain(name: str, reader: Reader) -> dict[str, Tensor]:
    return {name: reader.tensor(name)}
