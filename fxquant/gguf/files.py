"""GGUF files, whole or split: metadata, and tensors that are read when they are asked for."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FileError
from fxquant.gguf.header import GgufHeader, GgufTensor, read_header

FLOAT_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
)
"""Types of tensors that hold floats as they are; all others are blocks."""
_LARGE = 1e38
"""More than this, with fewer digits, may be more than float32 has."""
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufFile:
    """A model in GGUF."""

    path: Path
    """The file, or the first of several."""
    metadata: Mapping[str, Any]
    """Numbers, strings, and lists of them."""
    kinds: Mapping[str, tuple[int, int | None]]
    """The types of the metadata, see `GgufHeader`."""
    headers: Mapping[str, GgufTensor]
    """Every tensor, by name."""

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of the model: `llama`, `qwen3moe`.

        Raises:
            FileError: the file does not say.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise FileError(f"{self.path} does not say of which architecture it is: general.architecture is {found!r}")
        return found

    def value(self, key: str) -> Any:
        """What the metadata say about this architecture: `rope.freq_base`, of `llama.rope.freq_base`; else None.

        Raises:
            FileError: a number that is not finite.
        """
        found = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(found, float):
            return found
        if not math.isfinite(found):
            raise FileError(f"{self.path}: {self.architecture}.{key} is {found}")
        return shortest(found)

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one of those that it stacks along its first dimension. Reads nothing else.

        Returns:
            Floats of the shape in the header, or blocks: uint8, the bytes of a row in place of its weights.

        Raises:
            FileError: there is none, or the file cannot be read.
        """
        found = self.headers.get(name)
        if found is None:
            raise FileError(f"{self.path} holds no tensor {name}")
        shape, nbytes, offset = found.shape, found.nbytes, found.offset
        if index is not None:
            if not 0 <= index < shape[0]:
                raise FileError(f"{name} in {self.path} stacks {shape[0]} tensors, and has no number {index}")
            nbytes //= shape[0]
            shape, offset = shape[1:], offset + index * nbytes
        data = bytearray(nbytes)
        try:
            with found.file.open("rb") as file:
                file.seek(offset)
                count = file.readinto(data)
        except OSError as error:
            raise FileError(f"cannot read {name} in {found.file}: {error.strerror or error}") from None
        if count != nbytes:
            raise FileError(f"{found.file} has become shorter: it ends within {name}")
        dtype = FLOAT_TYPES.get(found.type_name)
        if dtype is None:
            return torch.frombuffer(data, dtype=torch.uint8).view(*shape[:-1], -1)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def shortest(value: float) -> float:
    """The shortest decimal that is this number in float32: 1e-05 and not 9.999999747378752e-06."""
    if not abs(value) < _LARGE:
        return value
    near = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((one for one in near if struct.pack("<f", one) == struct.pack("<f", value)), value)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """The metadata and the table of tensors of a file; of one that is split (`-00001-of-00003`), of all its parts.

    Raises:
        FileError: there is no such file; it, or another part, is not what GGUF says, or they contradict each other.
    """
    given = Path(path)
    if not given.is_file():
        raise FileError(f"there is no file {given}")
    found = _SPLIT.fullmatch(given.name)
    header = read_header(given)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return GgufFile(given, header.metadata, header.kinds, header.tensors)
    if found is None or int(found["count"]) != count:
        raise FileError(f"{given} is one of {count} files, and not named as such: model-00001-of-00003.gguf is")
    files = [given.with_name(f"{found['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileError(f"{given.parent} lacks {len(missing)} of {count} files: {', '.join(missing[:3])}")
    return _joined(files, [read_header(file) for file in files])


def _joined(files: list[Path], headers: list[GgufHeader]) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        own = header.metadata.get("split.no"), header.metadata.get("split.count")
        if own != (number, len(files)):
            raise FileError(f"{file} says that it is part {own[0]} (from 0) of {own[1]}, which its name does not")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise FileError(f"{min(twice)} is both in {file.name} and in another part of it")
        tensors |= header.tensors
    said = headers[0].metadata.get("split.tensors.count", len(tensors))
    if said != len(tensors):
        raise FileError(f"{files[0]} and its parts hold {len(tensors)} tensors, and are to hold {said}")
    return GgufFile(files[0], headers[0].metadata, headers[0].kinds, tensors)
