"""The quantized matrices of a checkpoint, by what a model calls them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fxquant.checkpoint_sources import CheckpointSource
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import CheckpointError, FileError, FxquantError
from fxquant.scheme import Scheme
from fxquant.transformers_weights import Names


def stored_matrices(source: CheckpointSource, names: Names) -> dict[str, StoredWeight]:
    """Every quantized matrix, by the name of the linear, or of one matrix of one expert, that it is of.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        FileError: the model has no place for one, or one for two.
    """
    places: dict[str, StoredWeight] = {}
    lost = []
    for weight in source.weights(names.model):
        name = names.of_matrix(weight.name)
        if name is None:
            lost.append(weight.name)
        elif name in places:
            raise FileError(f"{source.path}: {weight.name} and {places[name].name} are both {name} of the model")
        else:
            places[name] = weight
    refuse("holds quantized weights that the model has no linear for", source.path, lost)
    return places


def read_matrix(source: CheckpointSource, weight: StoredWeight, n: int, k: int) -> tuple[Scheme, dict[str, Tensor]]:
    """The scheme and the planes of one.

    Raises:
        CheckpointError: it is not what its format says.
        FileError: it cannot be read.
    """
    tensors = {own: source.tensor(piece.name, piece.index) for own, piece in weight.pieces.items()}
    try:
        return weight.read(tensors, n, k)
    except FxquantError as error:
        raise CheckpointError(f"{weight.name} in {source.path}: {error}") from error


def refuse(fault: str, path: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that does not go with its model, where there are such names.

    Raises:
        FileError: there are.
    """
    found = sorted(names)
    if found:
        more = ", ..." if len(found) > 5 else ""
        raise FileError(f"{path} {fault}: {len(found)}\n  {', '.join(found[:5])}{more}")
