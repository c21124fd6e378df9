"""A checkpoint of any kind, a directory or a GGUF file, as loading needs it: config, tensors, quantized matrices."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint_files import LazyTensor, TensorHeader, open_checkpoint
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import FileError
from fxquant.families import find_weights
from fxquant.gguf import GgufTensor, gguf_config, gguf_plain, gguf_weights, open_gguf
from fxquant.pretrained import as_file_error, check_numbers, load_config


@dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint; of its tensors nothing is read but what is asked for."""

    path: Path
    config: Any
    """Of transformers, without a word of quantization: planes say all there is to say."""
    headers: Mapping[str, TensorHeader | GgufTensor]
    tensor: Callable[[str, int | None], Tensor]
    """A tensor by name, or one of those that it stacks along its first dimension."""
    weights: Callable[[nn.Module], list[StoredWeight]]
    """The quantized matrices, for a model without weights."""
    plain: Callable[[nn.Module, set[str]], dict[str, LazyTensor]]
    """All tensors but those named, for such a model."""

    def nbytes(self, weight: StoredWeight) -> int:
        """Bytes of a quantized matrix in the files."""
        pieces = [(self.headers[piece.name], piece.index) for piece in weight.pieces.values()]
        return sum(h.nbytes if index is None else h.nbytes // max(h.shape[0], 1) for h, index in pieces)


def open_source(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> CheckpointSource:
    """Open a directory of safetensors files, a GGUF file, or a directory that holds one and no safetensors of a model.

    Args:
        path: of it.
        dtype: of the model; what the config says by default.

    Raises:
        FileError: there is no such thing, or it cannot be read.
        CheckpointError: it says that it is quantized in a way that is not known.
    """
    found = Path(path)
    files = sorted(found.glob("*.gguf")) if found.is_dir() and not any(found.glob("model*.safetensors*")) else []
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        names = ", ".join(file.name for file in files[:5])
        raise FileError(f"{found} holds {len(files)} GGUF files: name one of them\n  {names}")
    if files or found.suffix == ".gguf":
        return _gguf(files[0] if files else found, dtype)
    return _directory(found, dtype)


def _directory(path: Path, dtype: torch.dtype | None) -> CheckpointSource:
    files = open_checkpoint(path)
    config = copy.deepcopy(load_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if dtype is not None or config.dtype is None:
        config.dtype = dtype or _dtype(files.headers.values())
    _, stored = find_weights(files)
    return CheckpointSource(
        path=path,
        config=config,
        headers=files.headers,
        tensor=files.tensor,
        weights=lambda _: stored,
        plain=lambda _, claimed: {name: files.lazy(name) for name in sorted(files.headers.keys() - claimed)},
    )


def _dtype(headers: Iterable[TensorHeader]) -> torch.dtype:
    """That of most bytes among tensors of plain floats."""
    sizes: Counter[torch.dtype] = Counter()
    for header in headers:
        if header.dtype in (torch.float32, torch.bfloat16, torch.float16):
            sizes[header.dtype] += header.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _gguf(path: Path, dtype: torch.dtype | None) -> CheckpointSource:
    import transformers

    file = open_gguf(path)
    described = gguf_config(file)
    check_numbers(described, str(path))
    with as_file_error(f"the metadata of {path} describes no model"):
        config = transformers.AutoConfig.for_model(**described)
    wanted = dtype or config.dtype
    embeddings = file.headers.get("token_embd.weight")
    if not isinstance(wanted, torch.dtype):
        # What is not quantized stays exact, as long as that is not for norms alone, which are float32 in all files.
        wanted = torch.float32 if embeddings is not None and embeddings.type_name == "F32" else torch.bfloat16
    config.dtype = wanted

    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}

    return CheckpointSource(
        path=path,
        config=config,
        headers=file.headers,
        tensor=file.tensor,
        weights=lambda model: gguf_weights(file, shapes(model)),
        plain=lambda model, _: {
            name: LazyTensor(one.shape, wanted, one.read)
            for name, one in gguf_plain(file, shapes(model), wanted).items()
        },
    )
