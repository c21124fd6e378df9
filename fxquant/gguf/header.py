"""The header of a GGUF file: its metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Read here and not by the package
gguf, whose reader believes every count and offset that a file has, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fxquant.errors import FileError

_HEADER_LIMIT = 1 << 26
"""Bytes before the tensors: large vocabularies take a fifth of it."""
_ARRAY_LIMIT = 1 << 23
_MAX_DIMS = 4
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How `struct` calls the types of numbers."""
_SMALLEST_PAIR, _SMALLEST_TENSOR = 13, 32
"""Bytes that a pair of metadata and an entry for a tensor take at least."""


@dataclass(frozen=True)
class GgufTensor:
    """What a file says of a tensor."""

    file: Path
    type_name: str
    """As gguf calls it: `Q4_K`, `F32`."""
    shape: tuple[int, ...]
    """In weights, the order of torch: `[N, K]`, or `[E, N, K]` where it stacks experts."""
    offset: int
    """Of its first byte in the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors."""

    metadata: Mapping[str, Any]
    """Numbers, strings, and lists of them. Bytes that are no UTF-8 are `surrogateescape`d."""
    kinds: Mapping[str, tuple[int, int | None]]
    """The type of each value, by its number in the format; of a list, that of its elements, too."""
    tensors: Mapping[str, GgufTensor]
    """By name, in the order of the file."""


def read_header(path: Path) -> GgufHeader:
    """The header of a file; nothing else of it is read.

    Raises:
        FileError: the file cannot be read, is none of GGUF version 2 or 3, or says what cannot be true.
    """
    try:
        with path.open("rb") as file:
            return _header(_Bytes(file, path, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


class _Bytes:
    """Reads a file forward, and never more than it has."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0

    def error(self, fact: str) -> FileError:
        return FileError(f"{self.path}: {fact}\n  the file is damaged, incomplete, or no GGUF file")

    def require(self, count: int, what: str) -> None:
        left = min(self.size, _HEADER_LIMIT) - self.at
        if count > left:
            where = "it" if self.size <= _HEADER_LIMIT else "the header"
            raise self.error(f"{what} at byte {self.at} would take {count} bytes, and {where} can have {left} more")

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"it ends within {what} at byte {self.at}")
        self.at += count
        return data

    def numbers(self, form: str, count: int, what: str) -> tuple[Any, ...]:
        layout = f"<{count}{form}"
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def number(self, form: str, what: str) -> Any:
        return self.numbers(form, 1, what)[0]

    def string(self, what: str) -> str:
        # vocabularies hold halves of characters; they have to come back as they were
        return self.take(self.number("Q", what), what).decode("utf-8", "surrogateescape")

    def name(self, what: str) -> str:
        text = self.string(what)
        if not text.isprintable() or not text:
            raise self.error(f"{what} is {text[:80]!r}, which is no name")
        return text


def _header(data: _Bytes) -> GgufHeader:
    if data.take(4, "the magic number") != b"GGUF":
        raise data.error("it does not begin with GGUF")
    version = data.number("I", "the version")
    if version not in (2, 3):
        kind = "of big-endian byte order" if version & 0xFFFF == 0 else f"of version {version}"
        raise data.error(f"it is {kind}; versions 2 and 3, little-endian, can be read")
    count, pairs = data.numbers("Q", 2, "the counts")
    data.require(pairs * _SMALLEST_PAIR, f"metadata of {pairs} keys")
    metadata: dict[str, Any] = {}
    kinds: dict[str, tuple[int, int | None]] = {}
    for _ in range(pairs):
        key = data.name("a key")
        if key in metadata:
            raise data.error(f"it has the key {key} twice")
        metadata[key], kinds[key] = _value(data, f"the value of {key}")
    data.require(count * _SMALLEST_TENSOR, f"a table of {count} tensors")
    entries = [_entry(data) for _ in range(count)]
    return GgufHeader(metadata, kinds, _tensors(data, entries, _alignment(data, metadata)))


def _value(data: _Bytes, what: str) -> tuple[Any, tuple[int, int | None]]:
    kind = data.number("I", what)
    if kind in NUMBERS:
        return data.number(NUMBERS[kind], what), (kind, None)
    if kind == STRING:
        return data.string(what), (kind, None)
    if kind != ARRAY:
        raise data.error(f"{what} is of type {kind}, which is none of GGUF")
    inner, count = data.number("I", what), data.number("Q", what)
    if inner != STRING and inner not in NUMBERS:
        raise data.error(f"{what} is a list of elements of type {inner}, which can be none of a list")
    if count > _ARRAY_LIMIT:
        raise data.error(f"{what} is a list of {count} elements")
    data.require(count * (8 if inner == STRING else struct.calcsize(f"<{NUMBERS[inner]}")), what)
    if inner == STRING:
        return [data.string(what) for _ in range(count)], (kind, inner)
    return list(data.numbers(NUMBERS[inner], count, what)), (kind, inner)


_Entry = tuple[str, tuple[int, ...], int, int]


def _entry(data: _Bytes) -> _Entry:
    name = data.name("the name of a tensor")
    dims = data.number("I", f"the shape of {name}")
    if not 1 <= dims <= _MAX_DIMS:
        raise data.error(f"{name} has {dims} dimensions")
    shape = data.numbers("Q", dims, f"the shape of {name}")[::-1]
    return name, shape, data.number("I", f"the type of {name}"), data.number("Q", f"the offset of {name}")


def _alignment(data: _Bytes, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or found < 1 or found & (found - 1):
        raise data.error(f"general.alignment is {found!r}, which is no power of two")
    return found


def ggml_types() -> dict[int, tuple[str, int, int]]:
    """The types that tensors have: number, then name, weights of a block and its bytes."""
    from gguf import GGML_QUANT_SIZES

    # gguf 0.19 does not have this one yet
    return {42: ("Q2_0", 64, 18)} | {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}


def _tensors(data: _Bytes, entries: list[_Entry], alignment: int) -> dict[str, GgufTensor]:
    start = math.ceil(data.at / alignment) * alignment
    types = ggml_types()
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise data.error(f"it has two tensors {name}")
        if number not in types:
            raise data.error(f"{name} is of type {number}, which gguf does not know: a newer gguf may")
        kind, size, nbytes = types[number]
        if min(shape) < 1 or shape[-1] % size:
            raise data.error(f"{name} is {list(shape)}, which no tensor of type {kind} is: blocks have {size} weights")
        total = math.prod(shape) // size * nbytes
        if offset % alignment or start + offset + total > data.size:
            raise data.error(
                f"{name} is to have {total} bytes from byte {start} + {offset} on: "
                f"the file has {data.size}, and tensors begin at multiples of {alignment}"
            )
        tensors[name] = GgufTensor(data.path, kind, shape, start + offset, total)
    ordered = sorted(tensors.items(), key=lambda pair: pair[1].offset)
    for (first, one), (second, two) in itertools.pairwise(ordered):
        if one.offset + one.nbytes > two.offset:
            raise data.error(f"{first}, which is {one.type_name}, and {second} overlap")
    return tensors
