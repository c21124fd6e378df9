"""What each parameter of a model is made of, in the contents of a checkpoint that is to be written as GGUF."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.errors import FileError
from fxquant.experts import expert_weight, find_experts
from fxquant.gguf.fits import expert_place
from fxquant.gguf.models import gguf_architecture

_HEAD = "lm_head.weight"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One parameter of the model; or one projection of all experts of a layer, each of which is there on its own."""

    name: str
    """Of the parameter, `model.norm.weight`; of the projection, `model.layers.0.mlp.experts.gate_proj.weight`."""
    keys: tuple[str, ...]
    """Names in the contents: one, or those of the experts in their order."""
    matrices: tuple[Matrix, ...]
    """Where it is quantized, as the contents have them; else nothing."""
    stacked: bool
    """Whether it is a projection of experts."""


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Of all parameters of a model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def gguf_sources(contents: Contents, own_names: Mapping[str, str]) -> list[Source]:
    """What there is of each parameter, in the order of the model.

    The output matrix of a model that ties it to its embeddings is left out, if it is not quantized; so are tensors
    that the model's class is known to do without.

    Args:
        contents: of the checkpoint.
        own_names: what the model calls each of `contents.plain`, where it is not what the contents do.

    Raises:
        FileError: the contents have tensors that the model does not have, or others than its shapes say, or only some
            experts of a layer are quantized.
    """
    shapes = shapes_of(contents.model)
    parts: dict[str, dict[int, str]] = defaultdict(dict)
    for key, matrix in contents.matrices.items():
        _put(parts, key, f"{matrix.own}.weight", shapes)
    for key in contents.plain:
        own = own_names.get(key, key)
        if not _is_left_out(contents.model, own, shapes):
            _put(parts, key, own, shapes)
    stacks = _stacks(contents.model)
    found = []
    for name, keys in parts.items():
        if name not in shapes and name not in stacks:
            first = next(iter(keys.values()))
            raise FileError(f"{contents.path} holds {first}, which {type(contents.model).__name__} does not have")
        wanted = (shapes[name],) if name in shapes else stacks[name]
        found.append(_source(contents, name, keys, wanted, stacked=name not in shapes))
    order = {name: i for i, name in enumerate(shapes)}
    order |= {name: i for name in stacks for own, i in order.items() if own.startswith(name.rsplit(".", 2)[0] + ".")}
    return sorted(found, key=lambda one: order[one.name])


def _put(parts: Mapping[str, dict[int, str]], key: str, own: str, shapes: Mapping[str, Shape]) -> None:
    place = None if own in shapes else expert_place(own.removesuffix(".weight"))
    name, e = (own, 0) if place is None else (f"{place[0]}.{place[2]}.weight", int(place[1]))
    if e in parts[name]:
        raise FileError(f"{key} and {parts[name][e]} are both {own} of the model")
    parts[name][e] = key


def _is_left_out(model: Any, own: str, shapes: Mapping[str, Shape]) -> bool:
    if own in shapes or expert_place(own.removesuffix(".weight")):
        return own == _HEAD and own in getattr(model, "all_tied_weights_keys", {})
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, own) for pattern in ignored)


def _stacks(model: nn.Module) -> dict[str, tuple[Shape, ...]]:
    """Every projection of stacked experts, and the `[N, K]` of each expert's matrix."""
    return {
        f"{site.name}.{p.name}.weight": (tuple(expert_weight(site.module, site.layout, p.name, 0).shape),)
        * site.layout.experts
        for site in find_experts(model)
        for p in site.layout.projections
    }


def _source(
    contents: Contents, name: str, keys: Mapping[int, str], shapes: tuple[Shape, ...], *, stacked: bool
) -> Source:
    ordered = tuple(keys[e] for e in sorted(keys))
    matrices = tuple(contents.matrices[key] for key in ordered if key in contents.matrices)
    if sorted(keys) != list(range(len(shapes))):
        raise FileError(f"{contents.path} holds {name} of {len(keys)} experts, and the model has {len(shapes)}")
    if matrices and len(matrices) < len(keys):
        raise FileError(
            f"{contents.path}: GGUF has {name} of all experts in one tensor, of one type, and {len(matrices)} of "
            f"{len(keys)} are quantized\n  quantize all of them, or none"
        )
    conv1d = gguf_architecture(contents.config.model_type)[1].conv1d
    for key, shape in zip(ordered, shapes, strict=True):
        matrix = contents.matrices.get(key)
        found = (matrix.n, matrix.k)[:: -1 if conv1d else 1] if matrix else tuple(contents.plain[key].shape)
        if found != shape:
            raise FileError(f"{contents.path}: {key} is {list(found)}, and {name} of the model {list(shape)}")
    return Source(name, ordered, matrices, stacked)
