"""`load` on damaged checkpoints: a sample of what `benchmarks/fuzz_load.py` does thousands of times."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM

import fxquant
from fxquant.errors import FileError
from fxquant.modules import QLinear
from fxquant.pretrained import load_config, skeleton
from fxquant.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import fuzz_load
from fuzz_case import KINDS, Result, kinds_for, run_case, undamaged_logits
from fuzz_load import DATA, checkpoints, run_all

FOLDERS = checkpoints([DATA])
SEEDS = range(5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_or_an_error_of_fxquant(kind: str) -> None:
    able = [folder for folder in FOLDERS if kind in kinds_for(folder)]
    found = [run_case(able[seed % len(able)], kind, f"{kind}:{seed}") for seed in SEEDS]
    results = [result for result in found if result is not None]
    assert results, "nothing was damaged"
    for result in results:
        assert not result.problem, f"{result.source}: {result.what}: {result.outcome} {result.text}\n{result.problem}"
        assert "\n\n" not in result.text


def first(kind: str) -> Path:
    return next(folder for folder in FOLDERS if kind in kinds_for(folder))


def raises(error: BaseException) -> Any:
    def load(*_: Any, **__: Any) -> nn.Module:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (KeyError("x"), "KeyError"),
        (FileError("DefaultCPUAllocator: can't allocate memory"), "too much memory"),
    ],
)
def test_what_the_fuzzer_takes_for_a_fault(error: Exception, problem: str) -> None:
    found = run_case(first("data_bytes"), "data_bytes", "0", raises(error))
    assert found is not None
    assert problem in found.problem


def harmless(load: Any) -> Result:
    """A case of which `fxquant.load` makes the undamaged model."""
    tried = (run_case(first("metadata"), "metadata", str(seed), load) for seed in range(9))
    return next(result for result in tried if result is not None and result.outcome.startswith("loads"))


def changed(change: Any) -> Any:
    def load(path: Path, **options: Any) -> nn.Module:
        model = fxquant.load(path, **options)
        change(model)
        return model

    return load


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda model: model.lm_head.weight.data.neg_(), "a model with other logits"),
        (lambda model: model.lm_head.weight.data.fill_(torch.nan), "a model whose logits are not finite"),
        (lambda model: model.model.norm.to("meta"), "model.norm.weight was never loaded"),
        (lambda model: model.model.norm.register_forward_hook(lambda *_: 1 / 0), "a model that cannot run"),
    ],
)
def test_the_fuzzer_finds_a_wrong_model(change: Any, problem: str) -> None:
    assert not harmless(fxquant.load).problem
    assert harmless(changed(change)).problem.startswith(problem)


def test_a_crash_is_found_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(fuzz_load.__file__).parent)!r})\nimport fuzz_load\n"
        "run_case = fuzz_load.run_case\n"
        "fuzz_load.run_case = lambda *case: os.abort() if case[2] == 'dies' else run_case(*case)\n"
        "fuzz_load.chunk()\n"
    )
    monkeypatch.setattr(fuzz_load, "COMMAND", [sys.executable, str(script)])
    folder = first("pickled")
    found = [one for one in run_all([(folder, "pickled", seed) for seed in ("1", "dies", "3")]) if one is not None]
    assert [one.outcome for one in found] == ["FileError", "died", "FileError"]
    assert [one.problem[:27] for one in found] == ["", "the interpreter died with -", ""]


def test_a_config_that_brings_code_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (tmp_path / "evil.py").write_text("class Evil: pass")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("transformers asks whether to run the code"))
    with pytest.raises(FileError, match="cannot read the config"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1e.09: 65536 are the most"),
        ({"num_hidden_layers": 60_000}, "describes a model of more than"),
        ({"num_labels": 2**40}, "has num_labels"),
        ({"vocab_size": 2**40}, "that its config describes has .* weights, and the files hold"),
        ({"hidden_size": 2**31 // 6 * 6}, "that its config describes has .* weights|a table of"),
        ({"head_dim": 2**31}, "asks for a table of 1073741824 numbers"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps NaN"),
    ],
)
def test_sizes_that_no_memory_holds(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "gptq_w4_g64_asym_zero0", tmp_path / "model")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(data | changes))
    with pytest.raises(FileError, match=message):
        fxquant.load(folder, progress=False)


def test_tables_of_a_skeleton_are_bounded_before_they_are_computed() -> None:
    config = GPTJConfig(n_positions=1 << 20, rotary_dim=1 << 16, n_embd=64, n_layer=1, n_head=1, vocab_size=9)
    with pytest.raises(FileError, match="asks for a table of 34359738368 numbers"):
        skeleton(GPTJForCausalLM, config)


def test_the_order_of_columns_in_own_files_is_an_order(tmp_path: Path) -> None:
    model: Any = fxquant.load(DATA / "gptq_w4_g64_asym_zero0", progress=False)
    linear = model.model.layers[0].mlp.up_proj
    scheme = Scheme.parse(f"{linear.spelling}-perm")
    new = QLinear(linear.in_features, linear.out_features, scheme, dtype=linear.dtype, device="meta")
    new.load_planes({**linear.planes, "perm": torch.arange(linear.in_features, dtype=torch.int32).flip(0)})
    model.model.layers[0].mlp.up_proj = new
    fxquant.save(model, tmp_path / "good")
    fxquant.load(tmp_path / "good", progress=False)
    new.perm[0] = 1 << 30
    fxquant.save(model, tmp_path / "bad")
    with pytest.raises(FileError, match=r"up_proj.perm does not name each column once"):
        fxquant.load(tmp_path / "bad", progress=False)


def test_undamaged_checkpoints_give_logits() -> None:
    assert all(undamaged_logits(folder).isfinite().all() for folder in FOLDERS)
