"""Recipe files on disk: paths that cannot be read or written, and writes that replace a file whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fxquant.errors import FileError
from fxquant.recipe import Recipe


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("rules: [a: int8]")
    with pytest.raises(FileError, match=r"fats\.yaml': No such file or directory; did you mean fast\.yaml"):
        Recipe.from_file(tmp_path / "fats.yaml")
    with pytest.raises(FileError, match="Is a directory"):
        Recipe.from_file(tmp_path)
    with pytest.raises(FileError, match="Not a directory"):
        Recipe.from_file(tmp_path / "fast.yaml" / "x.yaml")
    with pytest.raises(FileError, match="null byte"):
        Recipe.from_file("a\0.yaml")


def test_paths_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    recipe = Recipe.preset("int4")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    bad = [
        tmp_path / "missing" / "a.yaml",
        tmp_path / "file" / "a.yaml",
        tmp_path / "folder",
        "a\0.yaml",
        tmp_path / ("a" * 300),
    ]
    for path in bad:
        with pytest.raises(FileError, match="cannot write the recipe"):
            recipe.to_file(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    Recipe.preset("int4").to_file(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match="No space left on device"):
        Recipe.preset("int8").to_file(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_writing_goes_through_links_and_keeps_the_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "a.yaml", tmp_path / "link.yaml"
    Recipe.preset("int4").to_file(path)
    path.chmod(0o640)
    link.symlink_to(path)
    Recipe.preset("int8").to_file(link)
    assert link.is_symlink()
    assert Recipe.from_file(path) == Recipe.preset("int8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
