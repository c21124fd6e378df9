"""What is read to write another checkpoint: quantized matrices as planes or as weights, and all other tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fxquant.checkpoint_files import LazyTensor
from fxquant.checkpoint_sources import CheckpointSource, open_source
from fxquant.checkpoints.stored import StoredWeight
from fxquant.experts import find_experts
from fxquant.gguf import GgufTensor
from fxquant.linears import find_linears
from fxquant.own_source import is_own, own_source
from fxquant.pretrained import check_size, model_class, skeleton
from fxquant.scheme import Scheme
from fxquant.stored_matrices import read_matrix, stored_matrices
from fxquant.transformers_weights import Names


@dataclass(frozen=True)
class Stored:
    """An opened checkpoint whose quantized matrices can be read one by one."""

    source: CheckpointSource
    names: Names
    """Of its model, without weights."""
    matrices: Mapping[str, StoredWeight]
    """By what the model calls them."""
    shapes: Mapping[str, tuple[int, int]]
    """N and K of every linear and of every matrix of experts of the model, by name."""
    plain: Mapping[str, LazyTensor]
    """All other tensors, by their names in the files."""

    @property
    def model(self) -> nn.Module:
        """The model that the config describes, without weights."""
        found: nn.Module = self.names.model
        return found

    def planes(self, own: str) -> tuple[Scheme, dict[str, Tensor]]:
        """A quantized matrix.

        Raises:
            CheckpointError: it is not what its format says.
            FileError: it cannot be read.
        """
        return read_matrix(self.source, self.matrices[own], *self.shapes[own])

    def nbytes(self, own: str) -> int:
        """Bytes of a quantized matrix in the files."""
        return self.source.nbytes(self.matrices[own])

    def type_of(self, own: str) -> str | None:
        """What the files call the type of a quantized matrix; None for one that is not."""
        if own not in self.matrices:
            return None
        header = self.source.headers[next(iter(self.matrices[own].pieces.values())).name]
        return header.type_name if isinstance(header, GgufTensor) else str(header.dtype).removeprefix("torch.")


def open_stored(path: str | os.PathLike[str]) -> Stored:
    """Open a checkpoint of any format that is known.

    Raises:
        CheckpointError, FileError: it cannot be read, or does not fit the model of its config.
    """
    source = own_source(path) if is_own(path) else open_source(path)
    model = skeleton(model_class(source.config), source.config, tensors=len(source.headers))
    check_size(model, sum(header.nbytes for header in source.headers.values()), str(source.path))
    names = Names(model)
    matrices = stored_matrices(source, names)
    plain = source.plain(model, {piece.name for weight in matrices.values() for piece in weight.pieces.values()})
    return Stored(source, names, matrices, shapes_of(model), plain)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """N and K of every linear and of every matrix of experts, by name."""
    found = {site.name: (site.n, site.k) for site in find_linears(model)}
    for site in find_experts(model):
        for name, weight in site.weights():
            n, k = weight.shape
            found[name] = n, k
    return found
