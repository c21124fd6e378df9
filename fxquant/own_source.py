"""A directory that `fxquant.model_files.save` wrote, opened as any other checkpoint is: matrix by matrix."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_files import (
    CheckpointFiles,
    LazyTensor,
    TensorHeader,
    open_checkpoint,
    read_headers,
    read_json,
)
from fxquant.checkpoint_sources import CheckpointSource
from fxquant.checkpoints.source import Planes, Source
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.errors import FileError
from fxquant.expert_containers import held_parameters
from fxquant.expert_layouts import expert_name
from fxquant.expert_matmul import PLAIN
from fxquant.expert_modules import QExperts
from fxquant.expert_stacks import Stack
from fxquant.model_files import build, is_model_directory
from fxquant.model_index import Index, index_from, read_index
from fxquant.model_tensors import weight_files
from fxquant.modules import QLinear
from fxquant.pretrained import load_config
from fxquant.scheme import Scheme
from fxquant.stored_matrices import refuse
from fxquant.transformers_weights import replaced_parameters


def own_source(path: str | os.PathLike[str]) -> CheckpointSource:
    """Open a directory in fxquant's own format.

    Buffers that are in the files although no state_dict has them (tables of rotary embeddings that were rounded with
    the model, say) are left out: other formats have no place for them.

    Raises:
        FileError: it is not what it should be.
    """
    folder = Path(path)
    if is_model_directory(path):
        index, headers = read_index(path), _headers(folder)
    else:
        files = open_checkpoint(folder)
        index, headers = _index_of_config(files), dict(files.headers)
    config = copy.deepcopy(load_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [index.model]
    files = CheckpointFiles(folder, {}, headers, {})
    held = len(headers), sum(header.nbytes for header in headers.values())
    model = build(config, index, held)
    return CheckpointSource(
        path=folder,
        config=config,
        headers=headers,
        tensor=files.tensor,
        weights=lambda _: list(_weights(model)),
        plain=lambda _, claimed: _plain(files, model),
    )


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether fxquant wrote a directory: `save`, or transformers' `save_pretrained` of a quantized model."""
    if is_model_directory(path):
        return True
    config = Path(path) / "config.json"
    said = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(said, dict) and said.get("quant_method") == "fxquant" and "modules" in said


def _headers(folder: Path) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for name, header in read_headers(file, {}):
            if name in headers:
                raise FileError(f"{folder}: {name} is in more than one file")
            headers[name] = header
    return headers


def _index_of_config(files: CheckpointFiles) -> Index:
    """What is quantized, as the config says it that transformers wrote."""
    said: Any = files.config.get("quantization_config")
    modules = said.get("modules") if isinstance(said, dict) else None
    if not isinstance(modules, dict):
        raise FileError(f"{files.path}: the quantization_config does not tell which modules are quantized")
    data = {"recipe": "", **modules, "format": said.get("format"), "shared": {}}
    return index_from(data, str(files.path / "config.json"))


def _weights(model: nn.Module) -> Iterator[StoredWeight]:
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            pieces = {plane: Piece(f"{name}.{plane}") for plane in module.plane_names}
            yield StoredWeight(name, pieces, partial(_read, module.scheme, None, ""))
        elif isinstance(module, QExperts):
            for stack in module.stacks:
                if stack.scheme != PLAIN:
                    yield from _experts(name, stack)


def _experts(name: str, stack: Stack) -> Iterator[StoredWeight]:
    for number, e in enumerate(stack.experts):
        pieces = {plane: Piece(f"{name}.{stack.tensor(plane)}", number) for plane in stack.planes}
        for p in stack.projections:
            read = partial(_read, Scheme.parse(stack.scheme), stack, p.name)
            yield StoredWeight(expert_name(name, e, p.name), pieces, read)


def _read(
    scheme: Scheme, stack: Stack | None, projection: str, tensors: Mapping[str, Tensor], n: int, k: int
) -> Planes:
    """Planes as they are; of a stack, the rows of one projection."""
    rows = None if stack is None else stack.rows(projection)
    if stack is not None and rows is not None:
        specs = scheme.planes(n, k)
        tensors = {
            name: t.view(stack.n, -1)[rows].reshape(specs[name].shape) if t.numel() % stack.n == 0 else t
            for name, t in tensors.items()
        }
    source = Source("fxquant", tensors, n, k)
    if misfit := scheme.misfit(n, k):
        raise source.error(misfit)
    planes = {name: source.take(name, spec.dtype, spec.shape) for name, spec in scheme.planes(n, k).items()}
    for name, plane in planes.items():
        if name.endswith("perm"):
            natural = torch.arange(plane.shape[-1], dtype=plane.dtype)
            source.require(torch.equal(plane.sort(-1).values, natural.expand_as(plane)), f"{name!r} is no permutation")
    return scheme, planes


def _plain(files: CheckpointFiles, model: nn.Module) -> dict[str, LazyTensor]:
    """By the names that the model has without quantized modules."""
    state = model.state_dict(keep_vars=True)
    found: dict[str, LazyTensor] = {}
    planes: set[str] = set()
    renamed: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            planes |= {f"{name}.{plane}" for plane in module.plane_names}
        elif isinstance(module, QExperts):
            planes |= {f"{name}.{tensor}" for stack in module.stacks if not stack.whole for tensor in stack.tensors}
            renamed |= {f"{name}.{p.replace('.', '_')}": f"{name}.{p}" for p in held_parameters(module.layout)}
            found |= _matrices(files, name, module)
    for name in files.headers:
        if name in state and name not in planes:
            found[renamed.get(name, name)] = files.lazy(name)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    known = buffers.keys() | state.keys() | set(replaced_parameters(model))  # of these, save_pretrained writes markers
    refuse("holds tensors that the model does not have", files.path, files.headers.keys() - known)
    return found


def _matrices(files: CheckpointFiles, name: str, module: QExperts) -> dict[str, LazyTensor]:
    """Matrices that stay as they are among quantized ones."""
    found = {}
    for stack in module.stacks:
        if stack.scheme == PLAIN and not stack.whole:
            tensor = f"{name}.{stack.tensor('weight')}"
            for number, e in enumerate(stack.experts):
                for p in stack.projections:
                    read = partial(_part, files, tensor, number, stack, p.name)
                    shape = (stack.part, stack.k)
                    found[f"{expert_name(name, e, p.name)}.weight"] = LazyTensor(shape, module.dtype, read)
    return found


def _part(files: CheckpointFiles, tensor: str, number: int, stack: Stack, projection: str) -> Tensor:
    whole: Any = files.tensor(tensor, number)
    rows = stack.rows(projection)
    result: Tensor = whole if rows is None else whole[rows]
    return result
