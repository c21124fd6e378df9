"""The command as a person types it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fxquant
from fxquant import Scheme
from fxquant.cli import app
from fxquant.model_files import read_model
from fxquant.presets import PRESETS
from fxquant.pretrained import load_model
from fxquant.scheme import ELEMENTS, NAMES

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import tiny_model

DENSE = str(Path(__file__).parent / "data" / "code-dense")
MOE = str(Path(__file__).parent / "data" / "code-moe")
COMMAND = [sys.executable, "-c", "from fxquant.cli import main; main()"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(first))
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random model, without a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("out") / "model"
    return out, run("quantize", DENSE, out, "--recipe", "int4-g64", "-x", "*.o_proj")


def test_help_is_enough_to_start() -> None:
    text = run("--help").stdout
    for command in ("plan", "quantize", "convert", "inspect", "recipes", "demo"):
        assert f"fxquant {command}" in text  # the examples
        assert re.search(rf"│ {command} +\S", text)  # the list of commands
        own = run(command, "--help")
        assert own.exit_code == 0
        assert command == "recipes" or f"fxquant {command}" in own.stdout.split("Example:")[1]
    assert run().stdout.strip() == text.strip()  # without arguments too


def test_version_needs_no_command() -> None:
    result = run("--version")
    assert result.exit_code == 0
    try:
        assert result.stdout == f"fxquant {importlib.metadata.version('fxquant')}\n"
    except importlib.metadata.PackageNotFoundError:
        assert result.stdout == "fxquant, a checkout that is not installed\n"


def test_plan_shows_every_weight_and_reads_no_weights(tmp_path: Path) -> None:
    shutil.copy(f"{DENSE}/config.json", tmp_path)  # the config is all that there is
    result = run("plan", tmp_path, "-r", "int4-g64", "-x", "*.layers.{2,3}.*", "--full")
    assert result.exit_code == 0, result.output
    plan = fxquant.plan(load_model(DENSE, progress=False), "int4-g64", exclude=["*.layers.{2,3}.*"])
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines() if re.search(r"\d+x\d+", line)]
    assert [(row[0], row[2]) for row in rows] == [(e.name, str(e.scheme or "keep")) for e in plan.entries]
    assert plan.table().notes[0] in result.stdout
    merged = run("plan", tmp_path, "-r", "int4-g64")
    assert cells(merged.stdout, "model.layers.{0..3}.mlp.up_proj (4x)")[2] == "int4-g64"


def test_quantize_writes_what_it_reports(quantized: tuple[Path, Result]) -> None:
    out, result = quantized
    assert result.exit_code == 0, result.output
    want = fxquant.quantize(load_model(DENSE, progress=False), "int4-g64", exclude=["*.o_proj"], progress=False)
    read: Any = read_model(out)
    left, right = want.state_dict(), read.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)
    assert "plan: 24 of 29 weights quantized" in result.stdout
    assert cells(result.stdout, "model.layers.{0..3}.mlp.up_proj (4x)")[1:4] == ["768x256", "int4-g64", "4.25"]
    assert "the rule keeps it: model.layers.0.self_attn.o_proj" in result.stdout
    assert result.stdout.endswith(f"written to {out}\n")
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "fxquant.json").read_text())["recipe"] == "int4-g64"


def test_inspect_a_quantized_model(quantized: tuple[Path, Result]) -> None:
    out, _ = quantized
    result = run("inspect", out)
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "format") == ["format", "fxquant (version 2)"]
    assert cells(result.stdout, "settings") == ["settings", "recipe int4-g64"]
    assert cells(result.stdout, "quantized") == ["quantized", "24 matrices, all in int4-g64"]
    assert cells(result.stdout, "bits")[1].startswith("4.25 per quantized weight")
    planes = 4 * Scheme.parse("int4-g64").nbytes(768, 256)
    row = cells(result.stdout, "model.layers.{0..3}.mlp.up_proj (4x)")
    assert row[1:] == ["768x256", "Linear", "int4-g64", "4.25", f"{planes / 1e3:.3g} kB"]
    elements = sum(t.numel() for t in read_model(out).state_dict().values() if t.dtype == torch.uint8)
    assert cells(result.stdout, "uint8")[2] == f"{elements:,}"
    assert cells(result.stdout, "model.layers.{0..3}.self_attn.o_proj (4x)")[3] == "bfloat16"


def test_inspect_a_model_in_full_precision() -> None:
    result = run("inspect", DENSE)
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "model  ")[1] == "LlamaForCausalLM (llama), bfloat16, 4,196,608 parameters"
    assert cells(result.stdout, "quantized") == ["quantized", "nothing"]
    assert cells(result.stdout, "bfloat16") == ["bfloat16", "39", "4,196,608", "8.39 MB"]
    row = cells(result.stdout, "model.layers.{0..3}.mlp.down_proj (4x)")
    assert row[1:] == ["256x768", "Linear", "bfloat16", "16", "1.57 MB"]
    full = run("inspect", DENSE, "--full").stdout
    assert cells(full, "model.layers.2.mlp.down_proj")[5] == "393 kB"


def test_inspect_of_files_with_problems_and_as_json(tmp_path: Path) -> None:
    shutil.copy(f"{DENSE}/config.json", tmp_path)  # the config is all that there is
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert cells(result.stdout, "problems  ")[1] == "1, see below"
    assert "holds no safetensors files" in result.stdout
    assert cells(result.stdout, "model.layers.{0..3}.mlp.down_proj (4x)")[1:3] == ["256x768", "Linear"]
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == json.loads(json.dumps(fxquant.inspect(tmp_path).to_dict()))
    result = run("inspect", DENSE, "--json", "--fast")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["parameters"] == 4_196_608
    assert "1 where there are problems" in " ".join(run("inspect", "--help").stdout.split())


def test_recipes_lists_presets_and_schemes_with_their_bits() -> None:
    text = run("recipes").stdout
    presets, schemes = text.split("schemes:")
    usual, named = schemes.split("schemes with a name")
    for name, preset in PRESETS.items():
        assert cells(presets, f"{name} ")[0] == name
        assert preset.description.split()[0] in presets
    rows = [re.split(r"\s{2,}", line.strip()) for line in schemes.splitlines() if re.match(r" \S+ +[\d.]+( |$)", line)]
    assert len(rows) >= 40
    for row in rows:
        assert float(row[1]) == pytest.approx(Scheme.parse(row[0]).bits_per_weight(), abs=6e-4)
    assert set(ELEMENTS) <= set(re.findall(r"\w+", usual))
    assert set(NAMES) <= {row[0] for row in rows}
    assert named.count("can be read only") == sum(not Scheme.parse(name).encodable for name in NAMES) > 0


ERRORS = [
    (("plan", DENSE, "-r", "int7"), "RecipeError: no preset and no scheme is called 'int7'; did you mean int8"),
    (("plan", DENSE, "-r", "int4-g64-asymm"), "SchemeError: unknown scheme 'int4-g64-asymm'"),
    (("plan", DENSE, "-r", "missing.yaml"), "FileError: "),
    (("plan", DENSE, "-r", "int4-g96"), "SchemeError: "),
    (("plan", DENSE, "-x", "*.qproj"), 'RecipeError: rule 1 matched nothing: "*.qproj"; did you mean "*.q_proj"?'),
    (("plan", "./no-such-model"), "FileError: there is no directory ./no-such-model"),
    (("plan", str(Path(DENSE).parent)), "holds no config.json: it is not the directory of a transformers checkpoint"),
    (("inspect", f"{DENSE}/config.json"), "is a file\n  give the directory of a transformers checkpoint"),
    (("quantize", DENSE, "OUT", "-r", "nonsense"), "RecipeError: no preset and no scheme is called 'nonsense'"),
    (("quantize", DENSE, "OUT/deep/er"), "FileError: cannot write OUT/deep/er: there is no directory"),
    (("quantize", DENSE, DENSE), "is what is to be read: give another place to write to"),
    (("quantize", DENSE, MOE), "is not empty\n  give another path, or --force"),
    (("quantize", DENSE, MOE, "--force"), "holds something else than a model that fxquant wrote: it is not replaced"),
    (("quantize", DENSE, "OUT", "--to", "ggfu"), "FileError: there is no format 'ggfu' to write; did you mean gguf?"),
    (("convert", DENSE, "OUT"), "is not quantized\n  give a recipe to quantize it by, such as int4"),
    (("quantize", "./no-such-model", "OUT"), "FileError: there is no directory ./no-such-model"),
    (("demo", "--model", "./no-such-model"), "FileError: there is no directory ./no-such-model"),
    (("demo", "--text", "missing.txt"), "FileError: cannot read missing.txt: No such file or directory"),
    (("demo", "--text", f"{DENSE}/model.safetensors"), "is not UTF-8 text"),
    (("demo", "--text", f"{DENSE}/config.json"), "64 windows of 256 tokens are wanted, the text holds"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors_are_one_plain_paragraph_and_leave_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    paragraph = result.stderr.strip().splitlines()
    assert re.match(r"\w+Error: ", paragraph[0])
    assert all(line.startswith("  ") for line in paragraph[1:])
    assert "Traceback" not in result.output
    assert list(tmp_path.rglob("*")) == [tmp_path / "OUT"]


def test_a_quantized_checkpoint_is_not_quantized_again(quantized: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = quantized
    for command in (("plan", out), ("quantize", out, tmp_path / "again")):
        result = run(*command)
        assert result.exit_code == 2
        assert "is quantized already" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert run("quantize", out, tmp_path / "again", "-r", "int8", "--requantize").exit_code == 0


def test_convert_says_what_became_of_each_matrix(quantized: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = quantized
    result = run("convert", out, tmp_path / "gptq", "--to", "gptq")
    assert result.exit_code == 0, result.output
    row = cells(result.stdout, "model.layers.{0..3}.mlp.up_proj (4x)")
    assert row[1:4] == ["768x256", "int4-g64", "int4-g64-fp16"]
    assert row[4] == "exact"
    assert "fp16 scales" in row[5]
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["bits"] == 4
    result = run("convert", out, tmp_path / "model.gguf", "--to", "gguf")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_force_replaces_what_fxquant_wrote(tiny: Path, tmp_path: Path) -> None:
    first = run("quantize", tiny, tmp_path / "out", "-r", "int8")
    assert first.exit_code == 0, first.output
    assert "no tokenizer is written: " in first.stderr
    again = run("quantize", tiny, tmp_path / "out", "-r", "fp8")
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    forced = run("quantize", tiny, tmp_path / "out", "-r", "fp8", "--force")
    assert forced.exit_code == 0, forced.output
    assert "all in fp8" in run("inspect", tmp_path / "out").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_option_that_does_not_exist_is_named() -> None:
    result = run("plan", DENSE, "--recipes", "int4")
    assert result.exit_code == 2
    assert "--recipes" in result.stderr
    assert "--recipe" in result.stderr


def test_a_bug_is_not_dressed_up_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fxquant.api.plan", broken)
    result = run("plan", DENSE)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.demo.run_demo", interrupted)
    result = run("demo")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_a_real_process_is_interrupted_plainly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo", "--no-compile", "--windows", "490"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "model" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr


def test_a_real_process_says_what_is_wrong() -> None:
    done = subprocess.run(
        [*COMMAND, "plan", DENSE, "-r", "int7"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "RecipeError: no preset and no scheme is called 'int7'" in done.stderr


def test_the_command_itself_imports_neither_torch_nor_transformers() -> None:
    """What commands need is imported by them: `--help` must not wait for it."""
    code = (
        "import sys, types; p = types.ModuleType('fxquant'); p.__path__ = [sys.argv[1]]; sys.modules['fxquant'] = p\n"
    )
    code += "import fxquant.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    folder = Path(fxquant.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
