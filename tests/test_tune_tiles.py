"""The script that measures tiles: what it writes can be read, and without a GPU it changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tune_tiles

from fxquant.lowering.shapes import Choice, Shape, Tile, choices, parse, stored


def test_the_stored_file_is_what_the_script_writes() -> None:
    text = tune_tiles.TABLE.read_text(encoding="utf-8")
    assert tune_tiles.text(json.loads(text)) == text
    assert parse(json.loads(text)) == stored()


def test_measured_entries_replace_those_of_the_same_weight_and_gpu() -> None:
    tile, other = Tile(16, 64, 64, 4, 2), Tile(32, 64, 128, 8, 3)
    old = [tune_tiles.entry(Shape(gpu, 4, 64, 128, most), Choice(tile, 2)) for gpu in ("A", "B") for most in (8, 16)]
    new = [tune_tiles.entry(Shape("A", 4, 64, 128, 32), Choice(other, 1))]
    data = json.loads(tune_tiles.TABLE.read_text(encoding="utf-8"))
    table = parse(json.loads(tune_tiles.text(tune_tiles.merged({**data, "measured": old}, new))))
    assert [(shape.device, shape.most) for shape, _ in table.measured] == [("A", 32), ("B", 8), ("B", 16)]
    assert choices(table, "A", 4, 64, 128, 8)[0] == Choice(other, 1)
    assert choices(table, "B", 4, 64, 128, 9)[0] == Choice(tile, 2)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "shapes.json"
    command = [sys.executable, tune_tiles.__file__, "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 1
    assert "there is no CUDA GPU here" in run.stderr
    assert not out.exists()


def test_every_tile_that_is_tried_can_be_compiled() -> None:
    tried = tune_tiles.tiles()
    assert len(set(tried)) == len(tried)
    assert all(tile.rows >= 16 and tile.columns >= 16 and tile.depth >= 16 for tile in tried)
    assert {tile for _, tile in stored().general} <= set(tried)
