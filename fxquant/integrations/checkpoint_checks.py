"""Checks of what transformers is about to load, before it does: checkpoints are files from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_files import TensorHeader, read_headers
from fxquant.errors import FileError
from fxquant.model_index import Index


def headers_of(files: Sequence[str] | None) -> dict[str, TensorHeader]:
    """All tensors of the safetensors files among these, by name.

    Raises:
        FileError: a file cannot be read.
    """
    paths = [Path(file) for file in files or () if str(file).endswith(".safetensors")]
    return {name: header for path in paths for name, header in read_headers(path, {})}


def refuse_packed(headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights that are no floats, or tiny ones: transformers would take the codes for weights.

    Raises:
        FileError: names a tensor and its dtype.
    """
    for name, found in headers.items():
        is_float = found.dtype.is_floating_point and found.dtype.itemsize > 1
        if name.endswith(".weight") and len(found.shape) > 1 and not is_float:
            raise FileError(
                f"{found.file.name} holds {name} as {found.dtype}: the checkpoint is quantized already, in a way that "
                "transformers does not know\n"
                "  give the checkpoint in full precision, or try fxquant.load, which reads more formats"
            )


def for_model(index: Index, model: Any, dtype: torch.dtype) -> Index:
    """An index as it holds for one model, which may be another part of what was saved, and in another dtype.

    A checkpoint of a whole model can be loaded as its base model, and the other way round.

    Args:
        index: of the checkpoint.
        model: a model of transformers, without weights.
        dtype: that was asked for; takes the place of the dtype that most modules had.

    Raises:
        FileError: nothing of the index is in the model.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    dtypes = [of for _, of in (*index.linears.values(), *index.experts.values())]
    usual = Counter(dtypes).most_common(1)[0][0] if dtypes else dtype

    def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
        names = {name: _own_name(name, known, model.base_model_prefix) for name in table}
        # The class that was saved has all of it; what it lacks is the file's fault, and told as such later.
        found = {names[n] or n: v for n, v in table.items() if names[n] or type(model).__name__ == index.model}
        return {name: (scheme, dtype if of == usual else of) for name, (scheme, of) in found.items()}

    found = replace(index, linears=renamed(index.linears), experts=renamed(index.experts))
    if not found.linears and not found.experts:
        raise FileError(f"{index.source} tells of no module of this {type(model).__name__}; it is of a {index.model}")
    return found


def _own_name(name: str, known: Collection[str], prefix: str) -> str | None:
    """What a model calls what a checkpoint of its class, its base model or a model around it calls `name`."""
    names = (name.removeprefix(f"{prefix}."), f"{prefix}.{name}", name)
    return next((one for one in names if one in known), None)


def check_planes(wanted: Mapping[str, Tensor], headers: Mapping[str, TensorHeader], prefix: str) -> None:
    """Refuse a checkpoint whose tensors are not what its quantized modules need.

    Args:
        wanted: all tensors of quantized modules, by every name; planes, which are buffers, need the very dtype.
        headers: of the files.
        prefix: name of the base model, as transformers puts it in front of names or takes it away.

    Raises:
        FileError: a tensor is missing, or has another shape or dtype.
    """
    found = {own: header for name, header in headers.items() if (own := _own_name(name, wanted, prefix)) is not None}
    there = {id(wanted[name]) for name in found}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in there]
    if missing:
        more = ", ..." if len(missing) > 3 else ""
        raise FileError(
            f"the checkpoint lacks {len(missing)} of the {len(wanted)} tensors of its quantized modules: "
            f"{', '.join(missing[:3])}{more}\n  its config says that these modules are quantized"
        )
    for name, header in found.items():
        need = wanted[name]
        is_dtype = header.dtype == need.dtype or (isinstance(need, nn.Parameter) and header.dtype.is_floating_point)
        if header.shape != tuple(need.shape) or not is_dtype:
            raise FileError(
                f"{header.file.name}: {name} is {header.dtype} {list(header.shape)}; "
                f"the config of the checkpoint says {need.dtype} {list(need.shape)}"
            )
