"""GGUF as a container: against the package gguf, and against files that lie."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import gguf_examples as examples
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.errors import FileError, FxquantError
from fxquant.gguf import GgufData, gguf_config, gguf_data, gguf_plain, gguf_weights, open_gguf, write_gguf

gguf = pytest.importorskip("gguf")
STRING, ARRAY = 8, 9
FLOAT32 = st.floats(width=32, allow_nan=False)
NUMBERS: dict[int, Any] = {
    0: st.integers(0, 2**8 - 1),
    1: st.integers(-(2**7), 2**7 - 1),
    2: st.integers(0, 2**16 - 1),
    3: st.integers(-(2**15), 2**15 - 1),
    4: st.integers(0, 2**32 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: FLOAT32,
    7: st.booleans(),
    10: st.integers(0, 2**64 - 1),
    11: st.integers(-(2**63), 2**63 - 1),
    12: st.floats(allow_nan=False),
}
SCALARS = {**NUMBERS, STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=12)}
VALUES = st.sampled_from(sorted(SCALARS)).flatmap(
    lambda kind: st.one_of(
        st.tuples(SCALARS[kind], st.just((kind, None))),
        st.tuples(st.lists(SCALARS[kind], min_size=1, max_size=4), st.just((ARRAY, kind))),
    )
)
KEYS = st.text("abcdefgh._", min_size=1, max_size=10)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_metadata_are_as_gguf_reads_them(tmp_path: Path, said: dict[str, Any]) -> None:
    values = {key: value for key, (value, _) in said.items()}
    kinds = {key: kind for key, (_, kind) in said.items()}
    data = {"a": GgufData("F32", (3, 5), partial(torch.arange, 15, dtype=torch.float32))}
    write_gguf(tmp_path / "a.gguf", values, kinds, data)
    file = open_gguf(tmp_path / "a.gguf")
    assert (file.metadata, file.kinds) == (values, kinds)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: reader.fields[key].contents() for key in values} == values
    assert torch.equal(torch.from_numpy(reader.tensors[0].data.copy()), file.tensor("a"))
    assert torch.equal(file.tensor("a", 2), file.tensor("a")[2])


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "TQ2_0", "MXFP4", "F16", "BF16"])
def test_tensors_are_as_gguf_reads_them(type_name: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 256), np.float32)
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("y", values[0, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    assert (file.headers["x.weight"].shape, file.headers["y"].shape) == ((3, 5, 256), (256,))
    stored = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data
    found = file.tensor("x.weight")
    assert np.array_equal(found.view(torch.uint8).numpy(), stored.view(np.uint8).reshape(3, 5, -1))
    assert torch.equal(file.tensor("x.weight", 1), found[1])
    for name, index in (("z", None), ("x.weight", 3), ("x.weight", -1)):
        with pytest.raises(FileError, match=name):
            file.tensor(name, index)


def test_a_file_is_written_again_byte_by_byte(tmp_path: Path) -> None:
    examples.write(tmp_path / "a.gguf", "qwen3moe", examples.build("qwen3moe"), "Q4_1")
    file = open_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", file.metadata, file.kinds, gguf_data(file))
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_another_alignment(tmp_path: Path) -> None:
    metadata, kinds = {"general.alignment": 256}, {"general.alignment": (4, None)}
    data = {name: GgufData("F16", (3,), partial(torch.full, (3,), i, dtype=torch.half)) for i, name in enumerate("ab")}
    write_gguf(tmp_path / "a.gguf", metadata, kinds, data)
    file = open_gguf(tmp_path / "a.gguf")
    assert [header.offset % 256 for header in file.headers.values()] == [0, 0]
    found = {t.name: t.data.tolist() for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert found == {name: file.tensor(name).tolist() for name in "ab"} == {"a": [0.0] * 3, "b": [1.0] * 3}


def test_a_type_that_gguf_does_not_have_yet(tmp_path: Path) -> None:
    blocks = torch.arange(36, dtype=torch.uint8).view(1, 36)
    write_gguf(tmp_path / "a.gguf", {}, {}, {"x": GgufData("Q2_0", (1, 128), lambda: blocks)})
    assert torch.equal(open_gguf(tmp_path / "a.gguf").tensor("x"), blocks)


def test_vocabularies_with_halves_of_characters(tmp_path: Path) -> None:
    tokens = [b"\xc3".decode("utf-8", "surrogateescape"), "é", ""]
    write_gguf(tmp_path / "a.gguf", {"tokens": tokens}, {"tokens": (ARRAY, STRING)}, {})
    assert open_gguf(tmp_path / "a.gguf").metadata == {"tokens": tokens}


def test_writing_leaves_what_was_there_until_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    for data in (
        GgufData("F32", (4,), lambda: torch.zeros(3)),
        GgufData("Q4_0", (1, 31), lambda: torch.zeros(18)),
        GgufData("Q9_0", (1, 32), lambda: torch.zeros(18)),
    ):
        with pytest.raises(FileError, match="x "):
            write_gguf(path, {}, {}, {"x": data})
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.gguf", b"before")]
    with pytest.raises(FileError, match="cannot write"):
        write_gguf(tmp_path / "nowhere" / "a.gguf", {}, {}, {})


def test_files_in_parts(tmp_path: Path) -> None:
    model = examples.build("llama")
    examples.write(tmp_path / "whole.gguf", "llama", model, "Q8_0")
    examples.write(tmp_path / "m.gguf", "llama", model, "Q8_0", split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    whole = open_gguf(tmp_path / "whole.gguf")
    for part in parts:
        file = open_gguf(part)
        assert file.path == parts[0]
        assert file.headers.keys() == whole.headers.keys()
        assert all(torch.equal(file.tensor(name), whole.tensor(name)) for name in whole.headers)
        assert gguf_config(file) == gguf_config(whole)
    renamed = tmp_path / "n-00001-of-00003.gguf"
    renamed.symlink_to(parts[1])
    for path, word in ((parts[0], "lacks 1 of 3"), (renamed, "lacks 2 of 3")):
        parts[2].unlink(missing_ok=True)
        with pytest.raises(FileError, match=word):
            open_gguf(path)
    parts[2].symlink_to(parts[0])
    with pytest.raises(FileError, match="part 0"):
        open_gguf(parts[0])
    parts[0].rename(tmp_path / "odd.gguf")
    with pytest.raises(FileError, match="one of 3 files"):
        open_gguf(tmp_path / "odd.gguf")


@dataclasses.dataclass(frozen=True)
class Lie:
    """A file with one tensor of 4 floats, but for what a test changes."""

    magic: bytes = b"GGUF"
    version: int = 3
    count: int = 1
    pairs: int = 1
    key: bytes = struct.pack("<Q", 1) + b"k"
    value: bytes = struct.pack("<II", 4, 7)
    name: bytes = struct.pack("<Q", 1) + b"t"
    dims: bytes = struct.pack("<IQ", 1, 4)
    kind: int = 0
    offset: int = 0
    again: bytes = b""
    data: bytes = bytes(16)

    def write(self, path: Path) -> Path:
        head = self.magic + struct.pack("<IQQ", self.version, self.count, self.pairs) + self.key + self.value
        head += self.name + self.dims + struct.pack("<IQ", self.kind, self.offset) + self.again
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path


SECOND = struct.pack("<Q", 1) + b"u" + struct.pack("<IQIQ", 1, 4, 0, 0)
ALIGNMENT = struct.pack("<Q", 17) + b"general.alignment"
LIES: dict[str, tuple[Lie, str]] = {
    "magic": (Lie(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (Lie(version=1), "version 1"),
    "big-endian": (Lie(version=3 << 24), "big-endian"),
    "tensors": (Lie(count=2**60), "table of 1152921504606846976 tensors"),
    "pairs": (Lie(pairs=2**60), "metadata of 1152921504606846976 keys"),
    "one pair too many": (Lie(pairs=2), "no name"),
    "a long key": (Lie(key=struct.pack("<Q", 2**50) + b"k"), "a key"),
    "a key that is none": (Lie(key=struct.pack("<Q", 1) + b"\0"), "no name"),
    "a long string": (Lie(value=struct.pack("<IQ", 8, 2**50)), "the value of k"),
    "a long list": (Lie(value=struct.pack("<IIQ", 9, 4, 2**60)), "list of"),
    "a list beyond the end": (Lie(value=struct.pack("<IIQ", 9, 0, 2**22)), "the value of k"),
    "a list of strings beyond the end": (Lie(value=struct.pack("<IIQ", 9, 8, 2**20)), "the value of k"),
    "lists of lists": (Lie(value=struct.pack("<IIQ", 9, 9, 1)), "can be none of a list"),
    "a value of no type": (Lie(value=struct.pack("<II", 13, 0)), "type 13"),
    "a long name": (Lie(name=struct.pack("<Q", 2**63) + b"t"), "the name of a tensor"),
    "no dimension": (Lie(dims=struct.pack("<I", 0)), "0 dimensions"),
    "many dimensions": (Lie(dims=struct.pack("<I", 2**31)), "2147483648 dimensions"),
    "nothing in it": (Lie(dims=struct.pack("<IQ", 1, 0)), r"t is \[0\]"),
    "too large": (Lie(dims=struct.pack("<IQQ", 2, 2**33, 2**33)), "bytes from byte"),
    "larger than 64 bits": (Lie(dims=struct.pack("<IQQQQ", 4, *[2**63] * 4)), "bytes from byte"),
    "one float too many": (Lie(dims=struct.pack("<IQ", 1, 5)), "is to have 20 bytes"),
    "half a block": (Lie(kind=2), "blocks have 32 weights"),
    "no type": (Lie(kind=4), "type 4"),
    "a type of the future": (Lie(kind=2**31), "newer"),
    "an offset beyond the end": (Lie(offset=2**63), "bytes from byte"),
    "an offset between": (Lie(offset=8, data=bytes(64)), "multiples of 32"),
    "twice": (Lie(count=2, again=SECOND.replace(b"u", b"t")), "two tensors t"),
    "overlapping": (Lie(count=2, again=SECOND), "t, which is F32, and u overlap"),
    "alignment 0": (Lie(key=ALIGNMENT, value=struct.pack("<II", 4, 0)), "no power of two"),
    "alignment 24": (Lie(key=ALIGNMENT, value=struct.pack("<II", 4, 24)), "no power of two"),
    "a huge alignment": (Lie(key=ALIGNMENT, value=struct.pack("<II", 4, 2**31)), "bytes from byte"),
    "alignment of a kind": (Lie(key=ALIGNMENT, value=struct.pack("<IQ", 8, 0)), "no power of two"),
    "keys twice": (Lie(pairs=2, value=Lie().value + Lie().key + Lie().value), "the key k twice"),
}


def test_the_truth(tmp_path: Path) -> None:
    file = open_gguf(Lie().write(tmp_path / "a.gguf"))
    assert file.metadata == {"k": 7}
    assert torch.equal(file.tensor("t"), torch.zeros(4))
    with pytest.raises(FileError, match="architecture"):
        gguf_config(file)


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, tmp_path: Path) -> None:
    made, fact = LIES[lie]
    path = made.write(tmp_path / "a.gguf")
    tracemalloc.start()
    with pytest.raises(FileError, match=rf"(?s)a\.gguf.*{fact}"):
        open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(FileError, match="no file"):
            open_gguf(path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(FileError, match="magic"):
        open_gguf(tmp_path / "empty.gguf")


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    examples.write(tmp_path / "a.gguf", "llama", examples.build("llama"), "Q8_0")
    data = (tmp_path / "a.gguf").read_bytes()
    last = max(open_gguf(tmp_path / "a.gguf").headers.values(), key=lambda header: header.offset)
    for size in (3, 5, 23, 24, 100, 700, 1500, last.offset, last.offset + last.nbytes - 1):
        (tmp_path / "b.gguf").write_bytes(data[:size])
        with pytest.raises(FileError, match=r"b\.gguf"):
            open_gguf(tmp_path / "b.gguf")


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = Lie().write(tmp_path / "a.gguf")
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="shorter"):
        file.tensor("t")
    path.unlink()
    with pytest.raises(FileError, match="cannot read t"):
        file.tensor("t")


def test_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    model = examples.build("llama")
    examples.write(tmp_path / "a.gguf", "llama", model, "Q4_0")
    whole, path, rng = (tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf", np.random.default_rng(0)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    head = min(header.offset for header in open_gguf(tmp_path / "a.gguf").headers.values())
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(4, head, rng.integers(1, 4)):
            data[at] = rng.choice([0, 1, 0x7F, 0xFF, data[at] ^ (1 << rng.integers(8))])
        path.write_bytes(data)
        try:
            file = open_gguf(path)
            gguf_config(file)
            gguf_plain(file, shapes)
            gguf_weights(file, shapes)
        except FxquantError:
            refused += 1
    assert refused > 200
