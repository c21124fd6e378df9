"""The files of a directory, as far as they can be read: what cannot is noted, and the others are looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fxquant.checkpoint_files import CheckpointFiles, TensorHeader, open_checkpoint, read_headers, read_json
from fxquant.errors import FileError
from fxquant.inspection.data import Notes

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_NAME = re.compile(r"[^\\/\0]{1,200}\.safetensors", re.DOTALL)
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors", re.DOTALL)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_GIT_LFS = b"version https://git-lfs"


def read_directory(folder: Path, notes: Notes) -> CheckpointFiles:
    """The config and the tensor headers of a directory; noted: what is missing, damaged, or in no index."""
    before = len(notes.problems)
    index = _index(folder, notes)
    try:
        # an index with a fault has been told of, and is followed as far as it is sound
        files = _salvaged(folder, index, notes) if len(notes.problems) > before else open_checkpoint(folder)
    except FileError as error:
        files = _salvaged(folder, index, notes)
        if len(notes.problems) == before:
            notes.problem("", error)
    for name, file in index.items():
        header = files.headers.get(name)
        if header is None:
            notes.problem(name, f"the index has it in {file}, and no file of it that can be read does")
        elif header.file.name != file:
            notes.problem(name, f"the index has it in {file}, and it is in {header.file.name}")
    _note_others(folder, {header.file.name for header in files.headers.values()} | set(index.values()), notes)
    return files


def _index(folder: Path, notes: Notes) -> dict[str, str]:
    """Which file each tensor is in, by the index; empty where there is none."""
    if not (folder / _INDEX).is_file():
        return {}
    data = notes.tried(lambda: read_json(folder / _INDEX), _INDEX) or {}
    found = data.get("weight_map")
    entries = found if isinstance(found, dict) else {}
    # the files that open_checkpoint would take, and no others: an index must not lead out of its directory
    usable = {name: file for name, file in entries.items() if _is_plain_name(file)}
    if data and len(usable) < max(1, len(entries)):
        notes.problem(_INDEX, f"{len(entries) - len(usable)} of {len(entries)} entries name no file of its directory")
    return usable


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and bool(_NAME.fullmatch(file)) and Path(file).name == file


def _salvaged(folder: Path, index: dict[str, str], notes: Notes) -> CheckpointFiles:
    """Every safetensors file that can be read, one by one."""
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        config = notes.tried(lambda: read_json(folder / CONFIG), CONFIG) or {}
    else:
        notes.problem(CONFIG, "there is no such file, and nothing else tells what model it is")
    headers: dict[str, TensorHeader] = {}
    metadata: dict[str, str] = {}
    whole = [_WHOLE] if (folder / _WHOLE).is_file() else [file.name for file in folder.glob("*.safetensors")]
    for name in sorted(set(index.values()) or whole):
        if not (folder / name).is_file():
            notes.problem(name, "there is no such file, and the index names it")
            continue
        if _is_pointer(folder / name):
            notes.problem(name, "it is a pointer of git-lfs, and not the file: git lfs pull gets that")
            continue
        with notes.noted(name):
            for tensor, header in read_headers(folder / name, metadata):
                if tensor in headers:
                    notes.problem(tensor, f"it is both in {headers[tensor].file.name} and in {name}")
                headers[tensor] = header
    return CheckpointFiles(folder, config, headers, metadata)


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_GIT_LFS)) == _GIT_LFS
    except OSError:
        return False  # whoever reads it says why


def _note_others(folder: Path, used: set[str], notes: Notes) -> None:
    """Weights beside those that are read."""
    for file in sorted(file.name for file in folder.glob("*.safetensors")):
        if file in used:
            continue
        if _SHARD.fullmatch(file) and (folder / _INDEX).is_file():
            notes.problem(file, "it looks like a part of the model, and the index does not name it: it is not read")
        else:
            notes.remark(file, "it is not part of the model: it is not read")
    pickled = sorted(file.name for ending in _PICKLES for file in folder.glob(ending))
    for name in pickled:
        notes.remark(name, "it is a pickle, which could run code when it is loaded: it is not read")
