"""Ways to damage the tensors of a checkpoint: valid safetensors and GGUF files whose content is wrong."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from checkpoint_mutations import Mutation
from safetensors_parts import DTYPES, Parts, read_parts

from fxquant.gguf.header import read_header

NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", **{f"I{b}": f"i{b // 8}" for b in (8, 16, 32, 64)}}
NUMPY |= {f"U{b}": f"u{b // 8}" for b in (8, 16, 32, 64)}
ODD_BITS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
WORDS = (0, 1, 2, 8, 2**16, 2**31 - 1, 2**31, 2**32 - 1)

Changed = tuple[str, list[int], bytes]


def _tensor(change: Callable[[Parts, str, random.Random], tuple[str, dict[str, Changed | None]] | None]) -> Mutation:
    """A mutation that changes one tensor, of those with a word in their names that quantized ones have, if it can."""

    def mutate(folder: Path, r: random.Random) -> str | None:
        file = next(iter((*folder.glob("model*.safetensors"), *folder.glob("fxquant*.safetensors"))), None)
        if file is None:
            return None
        parts = read_parts(file)
        names = sorted(parts.entries)
        for name in r.sample(names, len(names)):
            done = change(parts, name, r)
            if done is not None:
                parts.replace(done[1])
                parts.write(file)
                return f"{name}: {done[0]}"
        return None

    return mutate


def _parts(parts: Parts, name: str) -> Changed:
    entry = parts.entries[name]
    return entry["dtype"], list(entry["shape"]), parts.content(name)


def _dropped(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    return "dropped", {name: None}


def _renamed(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    pieces = name.split(".")
    options = (
        "",
        "x",
        name + ".weight",
        ".".join(pieces[:-1]),
        name.replace(".0.", f".{2**40}."),
        name.upper(),
        "." * 99,
    )
    new = r.choice((*options, name.replace("layers", "blocks"), name.replace(".0.", ".1."), name + "\0", "a" * 10000))
    return f"renamed to {new[:50]!r}", {name: None, new: _parts(parts, name)}


def _twice(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    new = r.choice(
        (f"{name}.weight", name.replace(".qweight", ".weight"), f"model.{name}", name.replace("layers.0", "layers.2"))
    )
    return f"also as {new[:50]}", {new + ("" if new != name else "_"): _parts(parts, name)}


def _swapped(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    other = r.choice(sorted(parts.entries))
    return f"swapped with {other}", {name: _parts(parts, other), other: _parts(parts, name)}


def _reshaped(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    dtype, shape, data = _parts(parts, name)
    total = len(data) // DTYPES[dtype]
    options = [[total], [*shape, 1], [1, *shape], shape[::-1], [1, total], [1] * 10 + shape]
    if shape and shape[0] % 2 == 0:
        options.append([shape[0] // 2, *shape[1:-1], shape[-1] * 2] if len(shape) > 1 else [2, shape[0] // 2])
    new = r.choice(options)
    return f"reshaped to {new}", {name: (dtype, new, data)}


def _resized(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    dtype, shape, data = _parts(parts, name)
    width = DTYPES[dtype]
    options = [[], [0], [0, *shape[1:]], [*shape[:-1], 0], [1], [*[max(1, s // 2) for s in shape]], [*shape[:-1], 1]]
    new = r.choice([*options, [shape[0] + 1, *shape[1:]] if shape else [2]])
    count = int(np.prod(new)) * width
    return f"resized to {new}", {name: (dtype, new, (data * 2 + bytes(count))[:count])}


def _cast(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]]:
    dtype, shape, data = _parts(parts, name)
    new = r.choice(sorted(DTYPES))
    count = len(data) // DTYPES[dtype] * DTYPES[new]
    return f"as {new}", {name: (new, shape, (data * 8)[:count])}


def _transposed(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]] | None:
    dtype, shape, data = _parts(parts, name)
    if len(shape) < 2:
        return None
    turned = np.frombuffer(data, f"V{DTYPES[dtype]}").reshape(shape).swapaxes(-1, -2)
    return "transposed", {name: (dtype, list(turned.shape), turned.tobytes())}


def _odd_floats(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]] | None:
    """Scales, mostly: not finite, negative, zero, tiny, huge."""
    dtype, shape, data = _parts(parts, name)
    if dtype not in ODD_BITS or not data or (".norm" in name and r.random() < 0.9):
        return None
    wide = np.array([r.choice((np.inf, -np.inf, np.nan, -1.0, 0.0, -0.0, 1e-40, 3e38, 65504.0))], "f4")
    one = (wide.view("u4") >> 16).astype("u2") if dtype == "BF16" else wide.astype(NUMPY[dtype])
    array = np.frombuffer(data, NUMPY[dtype]).copy()
    if r.random() < 0.5:
        array[:] = one
    else:
        array[r.randrange(len(array))] = one[0]
    return f"holds {wide[0]}", {name: (dtype, shape, array.tobytes())}


def _odd_integers(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]] | None:
    """Indices and codes that nothing has."""
    dtype, shape, data = _parts(parts, name)
    if dtype not in NUMPY or dtype in ODD_BITS or not data:
        return None
    array = np.frombuffer(data, NUMPY[dtype]).copy()
    limits = np.iinfo(array.dtype)
    value = r.choice((limits.min, limits.max, 0, 1, limits.max // 2, array.max(), min(len(array), limits.max)))
    at = slice(None) if r.random() < 0.3 else r.randrange(len(array))
    array[at] = value
    return f"holds {value}", {name: (dtype, shape, array.tobytes())}


def _noise(parts: Parts, name: str, r: random.Random) -> tuple[str, dict[str, Changed | None]] | None:
    dtype, shape, data = _parts(parts, name)
    return ("random bytes", {name: (dtype, shape, r.randbytes(len(data)))}) if dtype != "BOOL" else None


def _gguf(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def gguf_bytes(folder: Path, r: random.Random) -> str | None:
    """Single bytes of the header, or of the tensors; or fewer of them."""
    file = _gguf(folder)
    if file is None:
        return None
    data = bytearray(file.read_bytes())
    first = min(header.offset for header in read_header(file).tensors.values())
    at = r.randrange(first) if r.random() < 0.8 else r.randrange(len(data))
    if r.random() < 0.2:
        del data[at:]
    else:
        data[at] = r.randrange(256)
    file.write_bytes(data)
    return f"{file.name}: byte {at} of {first} + {len(data) - first}"


def gguf_counts(folder: Path, r: random.Random) -> str | None:
    file = _gguf(folder)
    if file is None:
        return None
    data = bytearray(file.read_bytes())
    at, form = r.choice(((4, "<I"), (8, "<Q"), (16, "<Q")))
    value = r.choice((0, 1, 2**31, 2**32 - 1)) if form == "<I" else r.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
    data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    file.write_bytes(data)
    return f"{file.name}: {value} at {at}"


def gguf_metadata(folder: Path, r: random.Random) -> str | None:
    """Type or value of a key."""
    file = _gguf(folder)
    if file is None:
        return None
    key = r.choice(sorted(read_header(file).metadata))
    at = _after(file, key) + r.choice((0, 4, 4, 4, 8))
    return f"{key}: {_overwrite(file, at, r)}"


def gguf_table(folder: Path, r: random.Random) -> str | None:
    """Dimensions, type or offset of a tensor."""
    file = _gguf(folder)
    if file is None:
        return None
    name, header = r.choice(sorted(read_header(file).tensors.items()))
    at = _after(file, name) + r.choice((0, 4, 12, 4 + 8 * len(header.shape), 8 + 8 * len(header.shape)))
    return f"{name}: {_overwrite(file, at, r)}"


def gguf_names(folder: Path, r: random.Random) -> str | None:
    """Keys and tensors of other names of the same length."""
    file = _gguf(folder)
    if file is None:
        return None
    header = read_header(file)
    name = r.choice([*sorted(header.metadata), *sorted(header.tensors)])
    at, data = _after(file, name), bytearray(file.read_bytes())
    length = len(name.encode())
    data[at - length + r.randrange(length)] = r.choice(b"0123456789._a\x00\xff")
    file.write_bytes(data)
    return f"{name} renamed"


def gguf_split(folder: Path, r: random.Random) -> str | None:
    file = _gguf(folder)
    if file is None:
        return None
    new = r.choice(
        ("model-00001-of-00002.gguf", "model-00002-of-00001.gguf", "model-99999-of-99999.gguf", "model.gguf.gguf")
    )
    if r.random() < 0.5:
        (folder / new).write_bytes(file.read_bytes())
        return f"and {new}"
    file.rename(folder / new)
    return f"is {new}"


def _after(file: Path, name: str) -> int:
    text = name.encode()
    return file.read_bytes().index(struct.pack("<Q", len(text)) + text) + 8 + len(text)


def _overwrite(file: Path, at: int, r: random.Random) -> str:
    data, form = bytearray(file.read_bytes()), r.choice(("<I", "<Q", "<f", "<i"))
    small: tuple[int, ...] = (-1, -(2**31)) if form == "<i" else WORDS
    value = r.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30)) if form == "<f" else r.choice(small)
    if form == "<Q":
        value = r.choice((*WORDS, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 - 32))
    data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    file.write_bytes(data)
    return f"{form[1]} {value} at {at}"


TENSOR_MUTATIONS: Mapping[str, Mutation] = {
    "tensor_dropped": _tensor(_dropped),
    "tensor_renamed": _tensor(_renamed),
    "tensor_twice": _tensor(_twice),
    "tensor_swapped": _tensor(_swapped),
    "tensor_reshaped": _tensor(_reshaped),
    "tensor_resized": _tensor(_resized),
    "tensor_cast": _tensor(_cast),
    "tensor_transposed": _tensor(_transposed),
    "odd_floats": _tensor(_odd_floats),
    "odd_integers": _tensor(_odd_integers),
    "noise": _tensor(_noise),
    **{m.__name__: m for m in (gguf_bytes, gguf_counts, gguf_metadata, gguf_table, gguf_names, gguf_split)},
}
