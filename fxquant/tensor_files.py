"""Files of tensors that are laid out before the first tensor is there, and filled in any order.

A file has its full size from the start: a tensor is written to its place as soon as it is made, so that no more than
that one is in memory, and what is written once need not be written again by a process that goes on later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fxquant.checkpoint_files import STORED_DTYPES, octets
from fxquant.errors import FileError
from fxquant.scheme import PlaneSpec

SHARD_SIZE = 5_000_000_000
"""Bytes from which on tensors are parted into several files."""
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FilePlan:
    """Files that are to be written."""

    headers: Mapping[str, bytes]
    """What each begins with, by name."""
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    """Of every tensor, by name."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further files: the index of several."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())


def plan_safetensors(specs: Mapping[str, PlaneSpec], stem: str, shard_size: int = SHARD_SIZE) -> FilePlan:
    """The files that hold these tensors: `<stem>.safetensors`, or shards with an index in which file each is.

    Format: https://github.com/huggingface/safetensors#format

    Args:
        specs: tensors by name, in the order in which they are parted.
        stem: of the file names.
        shard_size: bytes; a file is larger only where one tensor is.

    Raises:
        FileError: safetensors has no such dtype.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    strange = [name for name, spec in specs.items() if spec.dtype not in _NAMES]
    if strange:
        raise FileError(f"{strange[0]} is {specs[strange[0]].dtype}, which safetensors files do not have")
    parts = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        get_storage_id=lambda spec: None,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_size,
    )
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for file, names in parts.filename_to_tensors.items():
        headers[file], own = _safetensors_file(file, {name: specs[name] for name in names})
        sizes[file] = max((place.offset + place.nbytes for place in own.values()), default=len(headers[file]))
        places |= own
    texts = {}
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        texts[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
    return FilePlan(headers, sizes, places, texts)


def _safetensors_file(file: str, specs: Mapping[str, PlaneSpec]) -> tuple[bytes, dict[str, Place]]:
    # Larger elements first, so that each tensor is aligned to its own.
    ordered = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, offset = {}, 0
    for name in ordered:
        spec, starts[name] = specs[name], offset
        offset += spec.nbytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], offset],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: Place(file, len(header) + starts[name], specs[name].nbytes) for name in ordered}


def create_files(plan: FilePlan, folder: Path) -> None:
    """Make the files, without their tensors.

    Raises:
        FileError: there is no room for them.
        OSError: they cannot be written.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes:
        raise FileError(f"{folder.parent} has {free:,} bytes left, and the files take {plan.nbytes:,}")
    for name, header in plan.headers.items():
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(plan.sizes[name])
    for name, text in plan.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_tensor(plan: FilePlan, folder: Path, name: str, tensor: Tensor) -> None:
    """Put a tensor into its place.

    Args:
        plan: of files that were created.
        folder: where they are.
        name: of the tensor.
        tensor: on any device; its bytes are what counts.

    Raises:
        FileError: it has another size than its place.
        OSError: it cannot be written.
    """
    place = plan.places[name]
    plain = tensor.detach().cpu().contiguous()
    if plain.nbytes != place.nbytes:
        raise FileError(f"{name} has {plain.nbytes} bytes, and its place in {place.file} {place.nbytes}")
    data = octets(plain)
    with (folder / place.file).open("r+b", buffering=0) as file:
        file.seek(place.offset)
        while data:
            data = data[file.write(data) :]
