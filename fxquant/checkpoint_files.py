"""The files of a checkpoint, looked at before they are read: settings, tensor names, shapes and dtypes.

Nothing is unpickled, no code of the directory runs, and no tensor is read before it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FileError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
"""dtypes by the names that safetensors headers use."""
_JSON_LIMIT = 64 * 1024 * 1024
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Where in the file it begins."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for, by `[...]`: what transformers' loader takes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, index: object) -> Tensor:
        """The tensor, or a part of it."""
        return self.read()[index]  # type: ignore[index]


@dataclass
class CheckpointFiles:
    """A directory with a config and safetensors files."""

    path: Path
    config: Mapping[str, Any]
    """`config.json`."""
    headers: Mapping[str, TensorHeader]
    """Every tensor, by name."""
    metadata: Mapping[str, str]
    """What the files say about themselves, besides."""

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in another JSON file of the directory; None where there is no such file.

        Raises:
            FileError: it is no JSON object.
        """
        file = self.path / name
        return read_json(file) if file.is_file() else None

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """A tensor of the files, or one of those that it stacks along its first dimension. Reads nothing else.

        Raises:
            FileError: there is none, or the file cannot be read.
        """
        header = self.headers.get(name)
        if header is None:
            raise FileError(f"{self.path} holds no tensor {name}")
        if index is not None and not (header.shape and 0 <= index < header.shape[0]):
            raise FileError(f"{name} in {header.file} is {list(header.shape)}, and stacks no tensor {index}")
        # Not by a map of the file: its pages would count as memory of this process for as long as the file is open.
        result = torch.empty(header.shape if index is None else header.shape[1:], dtype=header.dtype)
        data = octets(result)
        try:
            with header.file.open("rb", buffering=0) as file:
                file.seek(header.offset + (index or 0) * result.nbytes)
                while data:
                    count = file.readinto(data)
                    if not count:
                        raise FileError(f"{header.file} has become shorter: it ends within {name}")
                    data = data[count:]
        except OSError as error:
            raise FileError(f"cannot read {name} in {header.file}: {error.strerror or error}") from None
        return result

    def lazy(self, name: str) -> LazyTensor:
        """A tensor of the files, to be read later."""
        header = self.headers[name]
        return LazyTensor(header.shape, header.dtype, partial(self.tensor, name))


def octets(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, as its own memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointFiles:
    """The config and all tensor headers of a directory.

    Raises:
        FileError: there is no such directory; it has no config, no safetensors, or files that contradict each other.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileError(f"there is no directory {folder}")
    if not (folder / "config.json").is_file():
        raise FileError(f"{folder} holds no config.json: it is not the directory of a transformers checkpoint")
    config = read_json(folder / "config.json")
    headers: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    for file in _files(folder):
        for name, header in read_headers(file, metadata):
            if name in headers:
                raise FileError(f"{name} is both in {headers[name].file.name} and in {file.name} of {folder}")
            headers[name] = header
    return CheckpointFiles(folder, config, headers, metadata)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: it cannot be read, is too large, or holds something else.
    """
    try:
        if file.stat().st_size > _JSON_LIMIT:
            raise FileError(f"{file} has {file.stat().st_size} bytes: no JSON of a checkpoint is that large")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FileError(f"{file} holds a {type(data).__name__}, not an object")
    return data


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index, the one, or all that there are."""
    index = folder / _INDEX
    if index.is_file():
        weights = read_json(index).get("weight_map")
        names = list(weights.values()) if isinstance(weights, dict) else []
        if not names or not all(isinstance(name, str) and _is_plain_name(name) for name in names):
            raise FileError(f"{index} does not map tensors to files of its own directory")
        files = [folder / name for name in sorted(set(names))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending))
        hint = f"\n  {', '.join(pickled[:3])} are pickles, which could run code: they are not read" if pickled else ""
        raise FileError(f"{folder} holds no safetensors files{hint}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileError(f"{folder} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:3])}")
    return files


def _is_plain_name(name: str) -> bool:
    # 255 bytes are the longest name that file systems have
    plain = Path(name).name == name and "\\" not in name and len(name.encode(errors="replace")) <= 255
    return plain and name.endswith(".safetensors")


def read_headers(file: Path, metadata: dict[str, str]) -> Iterator[tuple[str, TensorHeader]]:
    """Every tensor of a safetensors file, by name; what the file says about itself goes into `metadata`.

    Raises:
        FileError: it cannot be read, or has a tensor of a dtype that torch does not have.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            metadata.update(stored.metadata() or {})
            found = []
            for name in stored.offset_keys():
                part = stored.get_slice(name)
                dtype = STORED_DTYPES.get(str(part.get_dtype()))
                if dtype is None:
                    raise FileError(f"{file}: {name} has the dtype {part.get_dtype()}, which torch does not have")
                found.append((name, TensorHeader(file, dtype, tuple(part.get_shape()), 0)))
        # The format has no holes between tensors and nothing behind them, which safetensors has just checked.
        offset = file.stat().st_size - sum(header.nbytes for _, header in found)
        for name, header in found:
            yield name, replace(header, offset=offset)
            offset += header.nbytes
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {file}: {error}") from None
