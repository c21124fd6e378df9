"""GGUF files, written: the inverse of `fxquant.gguf.header` and `fxquant.gguf.weights`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fxquant.checkpoints import gguf_of_planes
from fxquant.errors import FileError
from fxquant.gguf.files import GgufFile
from fxquant.gguf.header import ARRAY, NUMBERS, STRING, ggml_types
from fxquant.gguf.models import gguf_model
from fxquant.gguf.names import has_experts, is_experts
from fxquant.gguf.weights import row_order
from fxquant.scheme import Scheme


@dataclass(frozen=True)
class GgufSpec:
    """What a file says of a tensor that is to be written."""

    type_name: str
    """As gguf calls it: `Q4_K`, `F32`."""
    shape: tuple[int, ...]
    """In weights: `[N, K]`."""


@dataclass(frozen=True)
class GgufData(GgufSpec):
    """A tensor to be written."""

    read: Callable[[], Tensor]
    """Its blocks or its floats; asked for once, when it is written."""


Places = Mapping[str, tuple[int, int]]
"""First byte in the file, and bytes, of each tensor."""


def gguf_data(file: GgufFile) -> dict[str, GgufData]:
    """Every tensor of a file, as it is."""
    return {
        name: GgufData(header.type_name, header.shape, partial(file.tensor, name))
        for name, header in file.headers.items()
    }


def gguf_blocks(file: GgufFile, tensor: str, planes: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The blocks of a tensor of a file that planes are: `StoredWeight.read`, undone.

    Args:
        file: one of the architecture.
        tensor: its name: `blk.0.attn_q.weight`; of experts, any one of those that it stacks.
        planes: of one matrix, its rows in the order of the model.
        scheme: one that GGUF has a type for.

    Returns:
        uint8 `[N, bytes of a row]`, the rows in the order of the file.

    Raises:
        CheckpointError: GGUF has no such type.
    """
    blocks = gguf_of_planes(planes, scheme)
    if is_experts(tensor):
        return blocks
    order = row_order(file, gguf_model(file.architecture, has_experts(file.headers)), tensor, len(blocks))
    return blocks if order is None else torch.empty_like(blocks).index_copy_(0, order.to(blocks.device), blocks)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    kinds: Mapping[str, tuple[int, int | None]],
    tensors: Mapping[str, GgufData],
) -> None:
    """Write a file. It takes the place of one that is there when all of it is written, and not before.

    Args:
        path: of the file.
        metadata: as `GgufFile.metadata` has them.
        kinds: the types of their values, as `GgufFile.kinds` has them.
        tensors: in the order in which they are to stand.

    Raises:
        FileError: it cannot be written, or a tensor is not what is said of it.
    """
    target = Path(path)
    header, places = gguf_header(metadata, kinds, tensors)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("xb") as file:
            _write(file, header, places, tensors)
            file.write(bytes(-file.tell() % _alignment(metadata)))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _write(file: BinaryIO, header: bytes, places: Places, tensors: Mapping[str, GgufData]) -> None:
    file.write(header)
    for name, (offset, nbytes) in places.items():
        octets = tensors[name].read().detach().cpu().contiguous().flatten().view(torch.uint8)
        if octets.numel() != nbytes:
            raise FileError(
                f"{name} is to be {tensors[name].type_name} {list(tensors[name].shape)}, which takes {nbytes} bytes, "
                f"and has {octets.numel()}"
            )
        file.write(bytes(offset - file.tell()))
        file.write(octets.numpy().data)


def gguf_header(
    metadata: Mapping[str, Any], kinds: Mapping[str, tuple[int, int | None]], tensors: Mapping[str, GgufSpec]
) -> tuple[bytes, Places]:
    """What a file begins with, and where in it each tensor is to stand, before any of them is there.

    Args:
        metadata: as `GgufFile.metadata` has them.
        kinds: the types of their values, as `GgufFile.kinds` has them.
        tensors: in the order in which they are to stand.

    Returns:
        All bytes up to the first tensor, and the places in the whole file. What is between tensors, and behind the last
        one up to a multiple of the alignment, which is 32 unless the metadata say otherwise, is zero.

    Raises:
        FileError: GGUF has no such tensor, or a value of the metadata has no type, or not its own.
    """
    types = {name: (number, size, nbytes) for number, (name, size, nbytes) in ggml_types().items()}
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    try:
        parts += [_string(key) + _value(value, *kinds[key]) for key, value in metadata.items()]
    except (KeyError, TypeError, struct.error) as error:
        raise FileError(f"a value of the metadata has no type, or not its own: {error}") from None
    offset, places = 0, {}
    for name, spec in tensors.items():
        if spec.type_name not in types or spec.shape[-1] % types[spec.type_name][1]:
            raise FileError(f"{name} cannot be written: GGUF has no {spec.type_name} of shape {list(spec.shape)}")
        number, size, nbytes = types[spec.type_name]
        places[name] = (offset, math.prod(spec.shape) // size * nbytes)
        dims = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
        parts.append(_string(name) + dims + struct.pack("<IQ", number, offset))
        offset += places[name][1] + -places[name][1] % _alignment(metadata)
    header = b"".join(parts)
    header += bytes(-len(header) % _alignment(metadata))
    return header, {name: (len(header) + start, nbytes) for name, (start, nbytes) in places.items()}


def _alignment(metadata: Mapping[str, Any]) -> int:
    return int(metadata.get("general.alignment", 32))


def _string(text: str) -> bytes:
    octets = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(octets)) + octets


def _value(value: Any, kind: int, inner: int | None) -> bytes:
    head = struct.pack("<I", kind)
    if kind == ARRAY and inner is not None:
        head += struct.pack("<IQ", inner, len(value))
        if inner == STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{NUMBERS[inner]}", *value)
    return head + (_string(value) if kind == STRING else struct.pack(f"<{NUMBERS[kind]}", value))
