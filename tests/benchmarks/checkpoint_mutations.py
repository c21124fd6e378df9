"""Ways to damage a checkpoint, for `fuzz_load.py`: each changes one thing in a copy of its directory.

A mutation takes the directory and a source of random numbers, and tells what it did; None where the directory has
nothing that it could change.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from json_mutations import JSON_MUTATIONS
from safetensors_parts import DTYPES, Entry, Parts, bytes_changed, read_parts

Mutation = Callable[[Path, random.Random], str | None]

MARKER = "code_has_run"
"""A file that exists once the code of a checkpoint has run."""


def config_code(folder: Path, r: random.Random) -> str | None:
    """Code of the directory's own, which must not run."""
    file = folder / "config.json"
    data = json.loads(file.read_text()) if file.is_file() else {}
    (folder / "evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass Evil: pass\n")
    data |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "trust_remote_code": True}
    if r.random() < 0.5:
        data["model_type"] = "evil"
    file.write_text(json.dumps(data))
    return f"auto_map, model_type {data.get('model_type')}"


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def pickled(folder: Path, r: random.Random) -> str | None:
    """Weights that are a pickle, under any name."""
    weights = next(iter((*folder.glob("model*.safetensors"), *folder.glob("*.gguf"), *folder.glob("fxquant.safe*"))))
    weights.unlink()
    name = r.choice(("pytorch_model.bin", "model.safetensors", "model.pt", "adapter.safetensors", weights.name))
    (folder / name).write_bytes(pickle.dumps(_Payload(folder / MARKER)))
    return f"{name} is a pickle"


def _safetensors(folder: Path) -> Path | None:
    files = [*folder.glob("model*.safetensors"), *folder.glob("fxquant*.safetensors")]
    return files[0] if files else None


def header_bytes(folder: Path, r: random.Random) -> str | None:
    file = _safetensors(folder)
    return bytes_changed(file, r, 0, 8 + read_parts(file).size) if file else None


def data_bytes(folder: Path, r: random.Random) -> str | None:
    file = _safetensors(folder)
    return bytes_changed(file, r, 8 + read_parts(file).size, None) if file else None


def header_length(folder: Path, r: random.Random) -> str | None:
    file = _safetensors(folder)
    if file is None:
        return None
    size = r.choice((0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1, file.stat().st_size, 100_000_000))
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    return f"{file.name}: a header of {size} bytes"


def _on_entries(change: Callable[[Parts, str, Entry, random.Random], object]) -> Mutation:
    """A mutation that changes the table of tensors, at one that is drawn."""

    def mutate(folder: Path, r: random.Random) -> str | None:
        file = _safetensors(folder)
        if file is None:
            return None
        parts = read_parts(file)
        name = r.choice(sorted(parts.entries))
        done = change(parts, name, parts.entries[name], r)
        parts.write(file)
        return f"{file.name}: {name}: {done}"

    return mutate


def _offsets(parts: Parts, name: str, entry: Entry, r: random.Random) -> object:
    first, last = entry["data_offsets"]
    other = parts.entries[r.choice(sorted(parts.entries))]["data_offsets"]
    options = [
        [first, 2**62],
        [2**63, 2**63 + last - first],
        [last, first],
        other,
        [0, last - first],
        [-1, last],
        [first],
    ]
    entry["data_offsets"] = r.choice([*options, [first + 1, last + 1], [first, last - 1], [1e308, 2], "0", None])
    return entry["data_offsets"]


def _declared(parts: Parts, name: str, entry: Entry, r: random.Random) -> object:
    """Another shape or dtype for the same bytes."""
    shape = list(entry["shape"])
    options = [
        [*shape, 1],
        shape[::-1],
        [0],
        [],
        [2**32, 2**32],
        [2**63],
        [-1],
        [sum(shape)],
        [1] * 70,
        [1e3],
        None,
        shape[1:],
    ]
    if r.random() < 0.5:
        entry["shape"] = r.choice(options)
        return f"shape {entry['shape']}"
    entry["dtype"] = r.choice((*DTYPES, "F4", "F6_E2M3", "C64", "x", None, 7))
    return f"dtype {entry['dtype']}"


header_offsets = _on_entries(_offsets)
header_declared = _on_entries(_declared)


def metadata(folder: Path, r: random.Random) -> str | None:
    file = _safetensors(folder)
    if file is None:
        return None
    parts = read_parts(file)
    values = (
        {"format": "tf"},
        {},
        None,
        [],
        {"format": 7},
        {"a": "b" * 10**6},
        {"quantized_module_map": "{", "packing": "["},
    )
    parts.metadata = r.choice(values)
    parts.write(file)
    return f"{file.name}: metadata {str(parts.metadata)[:60]}"


def shards(folder: Path, r: random.Random) -> str | None:
    """An index that leads out of the directory, or nowhere."""
    file = _safetensors(folder)
    if file is None:
        return None
    target = r.choice(
        ("../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "/dev/zero", "missing.safetensors", "..", "")
    )
    target = r.choice((target, target, 7, None, ["model.safetensors"], file.name, "\0.safetensors", "a" * 5000))
    names = sorted(read_parts(file).entries)
    mapped = dict.fromkeys(names, target) if r.random() < 0.5 else dict.fromkeys(names, file.name) | {names[0]: target}
    index = r.choice(
        ({"weight_map": mapped}, {"weight_map": mapped}, {"weight_map": names}, {}, [], {"weight_map": {}})
    )
    (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    return f"index: {str(target)[:40]}, {type(index).__name__} of {str(index)[:40]}"


def links(folder: Path, r: random.Random) -> str | None:
    """Files that are links to themselves, to devices, or to directories."""
    file = r.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    target = r.choice((file.name, "/dev/zero", "/dev/random", "..", "/proc/self/mem", "/nonexistent", "/dev/null"))
    file.unlink()
    file.symlink_to(target)
    return f"{file.name} is a link to {target}"


def side_file(folder: Path, r: random.Random) -> str | None:
    """A file that says something else than the config, or nothing that can be read."""
    names = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json", "fxquant.json")
    name = r.choice((*names, "generation_config.json", "quantization_config.json", "model.safetensors.index.json"))
    value = r.choice(
        ({}, [], {"bits": 3}, {"quant_method": "awq"}, {"quantization": {"quant_algo": "FP8"}}, 7, {"format": 2})
    )
    (folder / name).write_text(r.choice((json.dumps(value), "{", "\xff", "")))
    return f"{name}: {value}"


def only(folder: Path, r: random.Random) -> str | None:
    """A directory that lacks a file."""
    file = r.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    file.unlink()
    return f"without {file.name}"


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        *(*JSON_MUTATIONS, config_code, pickled, header_bytes, data_bytes, header_length, metadata),
        *(shards, links, side_file, only),
    )
} | {"header_offsets": header_offsets, "header_declared": header_declared}
