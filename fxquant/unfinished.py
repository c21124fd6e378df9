"""A directory that is written unit by unit, and goes on where it was when the process was killed.

It is called `.<name>.unfinished`, beside the place where it is to be, and holds a journal: what is written, a line of
JSON for each unit, put there when the bytes of the unit are on the disk. It takes its place when all of it is written,
and not before.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from torch import Tensor

from fxquant.errors import FileError, FxquantError
from fxquant.tensor_files import FilePlan, create_files, write_tensor

JOURNAL = "journal.jsonl"
_LOCK = "lock"
_SYNC = 64 << 20
"""Bytes after which what is written is put onto the disk: what a killed process has to do again, at most."""


@dataclass
class Unfinished:
    """An open directory; see `open_unfinished`."""

    folder: Path
    plan: FilePlan
    done: dict[int, Any]
    """The units that are written, and what was noted of each."""
    _journal: TextIO
    _pending: list[int] = field(default_factory=list)
    """Those that are not in the journal yet."""
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, unit: int, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Write the tensors of one unit; several threads may do so at a time.

        Args:
            unit: its number.
            tensors: all of its tensors.
            note: JSON-able; comes back in `done` when the work is resumed.

        Raises:
            FileError: a tensor has another size than its place.
            OSError: it cannot be written.
        """
        for name, tensor in tensors.items():
            write_tensor(self.plan, self.folder, name, tensor)
        with self._lock:
            self._bytes += sum(tensor.nbytes for tensor in tensors.values())
            self.done[unit] = note
            self._pending.append(unit)
            if self._bytes >= _SYNC:
                self.sync()

    def sync(self) -> None:
        """Put what is written onto the disk, and into the journal that it is there."""
        for name in self.plan.headers:
            _sync(self.folder / name)
        for unit in self._pending:
            self._journal.write(json.dumps({"unit": unit, "note": self.done[unit]}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending, self._bytes = [], 0


@contextmanager
def open_unfinished(target: Path, plan: FilePlan, identity: Mapping[str, Any]) -> Iterator[Unfinished]:
    """The directory in which `target` is made.

    When the block ends by an error that will be so again, it is removed; by any other, it is left, to be gone on with.

    Args:
        target: where it is to be in the end.
        plan: of its files.
        identity: JSON-able: what makes the result what it is. One that was begun for something else is begun anew.

    Raises:
        FileError: another process writes it.
        OSError: it cannot be written.
    """
    folder = unfinished_path(target)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FileError(f"{target} is being written by another process: {folder} is in use") from None
    try:
        with (folder / JOURNAL).open("a+", encoding="utf-8") as journal:
            done = _read(journal, identity)
            if done is None or not _has_files(folder, plan):
                done = {}
                _begin(folder, plan, journal, identity)
            found = Unfinished(folder, plan, done, journal)
            try:
                yield found
            finally:
                found.sync()
    except FxquantError as error:
        # What a file says would be so again; a file that cannot be read now may be readable later.
        if not isinstance(error, FileError) or not _read_anything(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def _read_anything(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.is_file() and journal.read_text(encoding="utf-8").count("\n") > 1


def unfinished_path(target: Path) -> Path:
    """Where a directory is while it is written."""
    absolute = target.absolute()
    return absolute.with_name(f".{absolute.name}.unfinished")


def finish(target: Path, file: str | None = None) -> None:
    """Move what is written into place, over what is there.

    Args:
        target: where the directory is to be.
        file: name of the one file that is to be there instead.

    Raises:
        OSError: it cannot be moved.
    """
    made, target = unfinished_path(target), target.absolute()
    for name in (JOURNAL, _LOCK):
        (made / name).unlink(missing_ok=True)
    if file is not None:
        os.replace(made / file, target)
        _sync(target.parent)
        shutil.rmtree(made)
        return
    old = made.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read(journal: TextIO, identity: Mapping[str, Any]) -> dict[int, Any] | None:
    """The units of the journal; None where it is of something else, or damaged."""
    journal.seek(0)
    lines = journal.read().split("\n")[:-1]  # a line without its end was not written whole
    try:
        entries = [json.loads(line) for line in lines]
        if not entries or entries[0] != json.loads(json.dumps(identity)):
            return None
        return {entry["unit"]: entry["note"] for entry in entries[1:]}
    except (ValueError, KeyError, TypeError):
        return None


def _begin(folder: Path, plan: FilePlan, journal: TextIO, identity: Mapping[str, Any]) -> None:
    for path in folder.iterdir():
        if path.name not in (JOURNAL, _LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    journal.seek(0)
    journal.truncate()
    create_files(plan, folder)
    journal.write(json.dumps(identity) + "\n")
    journal.flush()


def _has_files(folder: Path, plan: FilePlan) -> bool:
    """Whether the files are there, laid out as planned."""
    for name, header in plan.headers.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != plan.sizes[name]:
            return False
        with file.open("rb") as opened:
            if opened.read(len(header)) != header:
                return False
    return all((folder / name).is_file() for name in plan.texts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
