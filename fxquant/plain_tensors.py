"""The tensors of a model that are not quantized, made of those of a checkpoint: most of them by a name alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.scheme import PlaneSpec
from fxquant.transformers_weights import Names


@dataclass(frozen=True)
class Group:
    """Tensors of a model that are made together."""

    sources: tuple[str, ...]
    """What is read for them, as the checkpoint calls it."""
    keys: tuple[str, ...]
    """What they are in the model."""
    by_name: bool
    """The one is the other, under this name."""

    def make(self, names: Names, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of the model, in the dtype of the checkpoint or that which transformers gives them.

        Args:
            names: of the model.
            read: gives a tensor of the checkpoint.

        Raises:
            FileError: they cannot be made of what is read.
        """
        if self.by_name:
            return {self.keys[0]: read(self.sources[0])}
        return names.convert({name: read(name) for name in self.sources})


def groups_of(names: Names, specs: Mapping[str, PlaneSpec]) -> list[Group]:
    """What the tensors of a checkpoint become in a model, as transformers' loader puts them together.

    Args:
        names: of the model.
        specs: of the tensors, by name.

    Raises:
        FileError: some cannot be converted, or have other shapes than the model's.
    """
    keys = set(names.model.state_dict(keep_vars=True))
    found: list[Group] = []
    together: dict[str, list[str]] = {}
    for name in specs:
        key, pattern = names.renamed(name)
        if pattern is not None and key in keys:
            together.setdefault(key, []).append(name)
        else:
            found.append(Group((name,), (name if key not in keys and name in keys else key,), True))
    for sources in together.values():
        made = names.convert({name: empty(specs[name]) for name in sources})
        found.append(Group(tuple(sources), tuple(made), False))
    return found


def empty(spec: PlaneSpec) -> Tensor:
    """A tensor like this on the meta device."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
