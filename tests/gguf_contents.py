"""Checkpoints in memory, quantized or not, as they are given to what writes GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Contents, Matrix, Unit
from fxquant.codecs import dequantize, quantize
from fxquant.experts import expert_weight, find_experts
from fxquant.gguf import GgufData, GgufDescription, GgufTensors, gguf_fit, gguf_metadata, gguf_tensors, write_gguf
from fxquant.linears import find_linears
from fxquant.scheme import PlaneSpec, Scheme


@dataclass
class Checkpoint:
    """Contents, and their reader."""

    contents: Contents
    weights: dict[str, dict[str, Tensor]]
    tensors: dict[str, Tensor]

    def planes(self, matrix: str) -> Mapping[str, Tensor]:
        return self.weights[matrix]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def quantized(
    model: Any, scheme_of: Callable[[str, int, int], Scheme | None], dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """A model whose matrices are in the schemes that a function gives for their name, N and K; it gets their values.

    Experts are matrices of their own if any is quantized. The schemes are those that `gguf_fit` finds nearest.
    """
    found = _matrices(model)
    schemes = {name: scheme_of(name, *value.shape) for name, _, value in found}
    wanted = {name: Matrix(name, name, *v.shape, s) for name, _, v in found if (s := schemes[name]) is not None}
    fits = gguf_fit(wanted, model.config.model_type)
    matrices = {name: replace(one, scheme=s) for name, one in wanted.items() if (s := fits[name].scheme) is not None}
    used = {parameter for name, parameter, _ in found if name in matrices}
    weights, tensors = {}, {}
    for name, parameter, value in found:
        if name in matrices:
            weights[name] = quantize(value, matrices[name].scheme)
            value.copy_(dequantize(weights[name], matrices[name].scheme, *value.shape))
        elif parameter in used:
            tensors[f"{name}.weight"] = value.to(dtype)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, value in model.state_dict().items():
        if name not in used and name not in tied:
            tensors[name] = value.to(dtype)
    skeleton = type(model)(model.config).to("meta")
    plain = {name: PlaneSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return Checkpoint(Contents(Path("checkpoint"), model.config, skeleton, matrices, plain), weights, tensors)


@torch.no_grad()
def _matrices(model: Any) -> list[tuple[str, str, Tensor]]:
    """Name, parameter and values `[N, K]`, a view, of each matrix that can be quantized."""
    found = [
        (site.name, f"{site.name}.weight", site.module.weight.data.T if site.transposed else site.module.weight.data)
        for site in find_linears(model)
        if site.name != "lm_head"
    ]
    for site in find_experts(model):
        for name, e, projection in site.linears():
            value = expert_weight(site.module, site.layout, projection.name, e).data
            found.append((name, f"{site.name}.{projection.parameter}", value))
    return found


def made(checkpoint: Checkpoint, unit: Unit) -> Mapping[str, Tensor]:
    """What a unit makes, looked at: it has to be what the unit says."""
    read = set()

    class Reader:
        def planes(self, matrix: str) -> Mapping[str, Tensor]:
            read.add(matrix)
            return checkpoint.planes(matrix)

        def tensor(self, name: str) -> Tensor:
            read.add(name)
            return checkpoint.tensor(name)

    tensors = unit.make(Reader())
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in unit.tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert read == set(unit.inputs)
    return tensors


def write(
    path: Path, checkpoint: Checkpoint, own_names: Mapping[str, str] | None = None, tokenizer: Path | None = None
) -> tuple[GgufTensors, GgufDescription]:
    """Write a checkpoint as a GGUF file."""
    found = gguf_tensors(checkpoint.contents, own_names or {})
    inputs = [name for unit in found.units for name in unit.inputs]
    assert len(inputs) == len(set(inputs))
    values = {name: value for unit in found.units for name, value in made(checkpoint, unit).items()}
    assert values.keys() == found.specs.keys()
    described = gguf_metadata(checkpoint.contents.config, tokenizer, found.specs, path.stem)
    data = {name: GgufData(spec.type_name, spec.shape, lambda n=name: values[n]) for name, spec in found.specs.items()}
    write_gguf(path, described.metadata, described.kinds, data)
    return found, described
