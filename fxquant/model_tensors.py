"""The tensors of a model as safetensors files, and back into a model of the same structure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_files import STORED_DTYPES, read_json
from fxquant.errors import FileError, ModelError
from fxquant.expert_modules import QExperts
from fxquant.modules import QLinear
from fxquant.scheme import PlaneSpec
from fxquant.tensor_files import SHARD_SIZE, create_files, plan_safetensors, write_tensor

FLOATS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""dtypes that the weights of a model can have, by name."""
WEIGHTS = "fxquant.safetensors"
SHARDS = "fxquant.safetensors.index.json"
_SHARD = re.compile(r"fxquant-\d{5}-of-\d{5}\.safetensors")


def collect(model: nn.Module, fresh: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What has to be stored of a model so that `fresh` can become the same.

    Args:
        model: the model.
        fresh: the same structure without weights, as a reader will build it.

    Returns:
        Tensors on the CPU by name, each once; and the second names of those that have one. They are the tensors of the
        state_dict, and those other buffers that differ from the ones that `fresh` computes.

    Raises:
        ModelError: a tensor has no values, or the structures differ.
    """
    kept = model.state_dict(keep_vars=True)
    _check_structure(model, kept, fresh)
    computed = dict(fresh.named_buffers(remove_duplicate=False))
    others = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in kept and not _equal(buffer, computed.get(name))
    }
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in (kept | others).items():
        if tensor.is_meta:
            raise ModelError(f"{name} has no values: it is on the meta device")
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        plain = tensor.detach().cpu().contiguous()
        # A view of a larger storage would be refused by safetensors as sharing memory.
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        tensors[name] = plain if whole else plain.clone()
    return tensors, shared


def store(tensors: Mapping[str, Tensor], folder: Path, shard_size: int = SHARD_SIZE) -> None:
    """Write tensors as `fxquant.safetensors`, or in shards with an index in which file each tensor is.

    Args:
        tensors: by name; each with memory of its own.
        folder: a directory that holds no such files yet.
        shard_size: bytes; a file is larger only where one tensor is.

    Raises:
        FileError: there is no room for them.
        OSError: the files cannot be written.
    """
    specs = {name: PlaneSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    plan = plan_safetensors(specs, WEIGHTS.removesuffix(".safetensors"), shard_size)
    create_files(plan, folder)
    for name, tensor in tensors.items():
        write_tensor(plan, folder, name, tensor)


def weight_files(folder: Path) -> list[Path]:
    """The files that `store` wrote.

    Raises:
        FileError: an index that names other files, or files that are not there.
    """
    index = folder / SHARDS
    if not index.is_file():
        return [folder / WEIGHTS]
    names = read_json(index).get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    strange = [name for name in files if not (isinstance(name, str) and _SHARD.fullmatch(name))]
    if strange or not files:
        raise FileError(f"{index} names {strange[0] if strange else 'no files'}, not files as fxquant calls them")
    return [folder / name for name in sorted(set(files))]


def held(folder: Path) -> tuple[int, int]:
    """How many tensors the files of a directory hold, and their bytes.

    Raises:
        FileError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    count = nbytes = 0
    try:
        for file in weight_files(folder):
            nbytes += file.stat().st_size
            with safe_open(file, framework="pt") as stored:
                count += len(stored.keys())
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read the weights in {folder}: {error}") from None
    return count, nbytes


def load(model: nn.Module, folder: Path, shared: Mapping[str, str]) -> None:
    """Put the tensors of a directory into a model, after a check of all names, shapes and dtypes.

    Args:
        model: `QLinear`s in place; its tensors may be on the meta device.
        folder: where `store` wrote.
        shared: the second names of tensors.

    Raises:
        FileError: a file cannot be read, or does not fit the model; says which tensor.
    """
    from safetensors import SafetensorError, safe_open

    places = dict(model.named_buffers(remove_duplicate=False)) | model.state_dict(keep_vars=True)
    loaded: dict[str, Tensor] = {}
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
            owners = {name: stored for stored in files for name in stored.keys()}  # noqa: SIM118
            if len(owners) < sum(len(stored.keys()) for stored in files):
                raise FileError(f"{folder}: a tensor is in more than one file")
            _check_names(folder, set(owners), model, places, shared)
            filled, planes = [*owners, *shared], _planes(model)
            for name in filled:
                source = shared.get(name, name)
                _check_tensor(folder, name, owners[source].get_slice(source), places[name], planes)
            loaded = {name: _like(places[name], stored.get_tensor(name)) for name, stored in owners.items()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read the weights in {folder}: {error}") from None
    for name in filled:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        place: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        place[leaf] = loaded[shared.get(name, name)]


def _check_structure(model: nn.Module, kept: Mapping[str, Any], fresh: nn.Module) -> None:
    kind = type(model).__name__
    for name, tensor in kept.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} of this {kind} is a {type(tensor).__name__}, not a tensor")
    wanted = {name: tuple(t.shape) for name, t in fresh.state_dict(keep_vars=True).items()}
    found = {name: tuple(t.shape) for name, t in kept.items()}
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if different:
        name = different[0]
        raise ModelError(
            f"this {kind} cannot be built again from its config: {len(different)} tensors differ, first {name}\n"
            f"  in the model: {found.get(name, 'not there')}; built from the config: {wanted.get(name, 'not there')}"
        )


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.is_meta or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.cpu(), b)


def _check_names(
    folder: Path,
    names: set[str],
    model: nn.Module,
    places: Mapping[str, Tensor],
    shared: Mapping[str, str],
) -> None:
    faults = {
        "lacks tensors of the model": set(model.state_dict(keep_vars=True)) - set(shared) - names,
        "holds tensors that the model does not have": names - set(places),
        "and its index disagree on shared tensors": (set(shared) - set(places)) | (set(shared.values()) - names),
    }
    found = [
        f"{fault}: {', '.join(sorted(which)[:3])}{', ...' if len(which) > 3 else ''} ({len(which)})"
        for fault, which in faults.items()
        if which
    ]
    if found:
        raise FileError(f"{folder} " + "\n  and ".join(found))


def _check_tensor(folder: Path, name: str, header: Any, old: Tensor, planes: set[str]) -> None:
    shape, dtype = tuple(header.get_shape()), STORED_DTYPES.get(header.get_dtype())
    # Planes are exact. The dtype of other floats is the file's to say: a config has one for all of them.
    both_floats = name not in planes and {dtype, old.dtype} <= set(FLOATS.values())
    if shape != tuple(old.shape) or not (dtype == old.dtype or both_floats):
        raise FileError(
            f"{folder}: {name} is {header.get_dtype()} {list(shape)}; the model needs {old.dtype} {list(old.shape)}"
        )


def _planes(model: nn.Module) -> set[str]:
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.{plane}" for name, m in modules if isinstance(m, (QLinear, QExperts)) for plane in m.plane_names}


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
