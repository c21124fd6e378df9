"""Safetensors files in parts that can be changed and put together again, whether or not the result makes sense."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "BOOL": 1,
    **{f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)},
}
"""Bytes by name."""


@dataclass
class Parts:
    """A file in its parts."""

    entries: dict[str, Entry]
    """`dtype`, `shape` and `data_offsets` of each tensor."""
    data: bytes
    metadata: Any
    size: int
    """Of the header, as it was read."""

    def content(self, name: str) -> bytes:
        first, last = self.entries[name]["data_offsets"]
        return self.data[first:last]

    def replace(self, changed: dict[str, tuple[str, list[int], bytes] | None]) -> None:
        """Other tensors under some names, or None for no tensor; offsets are those of what is left."""
        tensors = {name: (e["dtype"], e["shape"], self.content(name)) for name, e in self.entries.items()}
        kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        data, entries = bytearray(), {}
        # wide dtypes first, as the library writes them: it wants tensors to be aligned
        for name, (dtype, shape, content) in sorted(kept.items(), key=lambda pair: -DTYPES.get(pair[1][0], 1)):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        self.data, self.entries = bytes(data), entries

    def write(self, file: Path) -> None:
        table = self.entries if self.metadata is None else {"__metadata__": self.metadata, **self.entries}
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text + self.data)


def read_parts(file: Path) -> Parts:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + size])
    return Parts(
        {k: v for k, v in entries.items() if k != "__metadata__"},
        content[8 + size :],
        entries.get("__metadata__"),
        size,
    )


def bytes_changed(file: Path, r: random.Random, first: int, last: int | None) -> str:
    """Change some bytes of a file, from `first` up to `last`, or take some away; tells which."""
    data = bytearray(file.read_bytes())
    end = len(data) if last is None else min(last, len(data))
    at = r.randrange(first, max(first + 1, end))
    kind = r.choice(("flip", "flip", "zero", "random", "insert", "delete", "cut", "append"))
    size = r.choice((1, 1, 4, 8, 64))
    if kind == "flip" and at < len(data):
        data[at] ^= 1 << r.randrange(8)
    elif kind == "zero":
        data[at : at + size] = bytes(min(size, max(0, len(data) - at)))
    elif kind == "random":
        data[at : at + size] = r.randbytes(min(size, max(0, len(data) - at)))
    elif kind == "insert":
        data[at:at] = r.randbytes(size)
    elif kind == "delete":
        del data[at : at + size]
    elif kind == "cut":
        del data[at:]
    else:
        data += r.randbytes(size)
    file.write_bytes(data)
    return f"{file.name}: {kind} at {at} of {len(data)}"
