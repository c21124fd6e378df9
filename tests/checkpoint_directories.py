"""Directories of quantized checkpoints for tests, written from single linears and from random tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.checkpoint_files import CheckpointFiles, open_checkpoint
from fxquant.checkpoints import Planes
from fxquant.checkpoints.stored import StoredWeight

ZOO = Path(__file__).parent / "data" / "zoo"
SETTINGS: dict[str, dict[str, Any]] = json.loads((ZOO / "settings.json").read_text())


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: object = None,
    *,
    files: Mapping[str, object] | None = None,
    metadata: dict[str, str] | None = None,
    **config: object,
) -> CheckpointFiles:
    """A directory that holds these tensors in one file, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    said = config | ({} if settings is None else {"quantization_config": settings})
    for name, value in {"config.json": said, **(files or {})}.items():
        (folder / name).write_text(json.dumps(value))
    save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        folder / "model.safetensors",
        metadata,
    )
    return open_checkpoint(folder)


def write_extract(folder: Path, name: str) -> tuple[CheckpointFiles, dict[str, Any], dict[str, Tensor]]:
    """The directory of a checkpoint of the zoo with a single linear; what is known of it; what it decodes to."""
    tensors, expected = {}, {}
    with safe_open(ZOO / f"{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        for key in file.keys():  # noqa: SIM118
            module, _, part = key.rpartition("/")
            tensor = file.get_tensor(key)
            stack, _, expert = module.rpartition(".")
            if name.startswith("gptoss"):
                assert expert == "0"
                parent, _, projection = stack.rpartition(".")
                module, key, tensor = f"{parent}.0.{projection}", f"{stack}_{part}", tensor.unsqueeze(0)
            if part == "expected":
                expected[module] = tensor.squeeze(0) if tensor.ndim == 3 else tensor
            else:
                tensors[key.replace("/", ".")] = tensor
    said = SETTINGS[name]
    config = dict(said["config"])
    files = write_checkpoint(
        folder,
        tensors,
        config.pop("quantization_config", None),
        files=said["files"],
        metadata=said["metadata"],
        **config,
    )
    return files, about, expected


def read(files: CheckpointFiles, weight: StoredWeight, n: int, k: int) -> Planes:
    """A matrix of a checkpoint, with its own tensors."""
    return weight.read({key: files.tensor(p.name, p.index) for key, p in weight.pieces.items()}, n, k)
