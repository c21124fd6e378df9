"""`inspect`: what it tells of checkpoints, against what `load` makes of them; and all that it finds wrong at once."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.checkpoint_tables import checkpoint_tables
from fxquant.errors import FileError, FxquantError
from fxquant.gguf import open_gguf
from fxquant.inspection import Inspection, inspect
from fxquant.pretrained import load_model
from fxquant.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from fuzz_case import KINDS, kinds_for
from tiny_models import tiny_model

DATA = Path(__file__).parent / "data"
# Another folder of checkpoints of the same kind, each with meta.json and expected.safetensors.
FOLDER = Path(os.environ.get("FXQUANT_ZOO_DIRECTORIES", DATA / "checkpoints"))
DIRECTORIES = sorted(path.parent for path in FOLDER.glob("*/meta.json"))
OWN_DATA = pytest.mark.skipif("FXQUANT_ZOO_DIRECTORIES" in os.environ, reason="needs the checkpoints of tests/data")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def quiet(path: Path, **options: Any) -> Inspection:
    return inspect(path, progress=False, **options)


def told(found: Inspection) -> set[tuple[str, str]]:
    """Problems: places, and the first words of what is wrong."""
    return {(one.place, one.text.splitlines()[0]) for one in found.problems}


def places(found: Inspection) -> set[str]:
    return {one.place for one in found.problems}


def text(found: Inspection, full: bool = False) -> str:
    return "\n".join(str(table) for table in checkpoint_tables(found, full=full))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint of tests/data, without what it is to decode to."""

    def copy(name: str) -> Path:
        ignore = shutil.ignore_patterns("expected.safetensors", "meta.json")
        path = Path(shutil.copytree(DATA / "checkpoints" / name, tmp_path / "model", ignore=ignore))
        for file in (path, *path.iterdir()):
            file.chmod(0o755)
        return path

    return copy


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    edit(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("path", DIRECTORIES, ids=lambda path: path.name)
def test_it_tells_what_load_makes(path: Path) -> None:
    found, model = quiet(path), fxquant.load(path, progress=False)
    report = fxquant.report(model)
    assert found.problems == ()
    want = {x.name: ((x.n, x.k), x.scheme, pytest.approx(x.bits)) for x in report.layers}
    assert {x.name: (x.shape, x.scheme, x.bits) for x in found.quantized} == want
    assert (found.model, found.parameters) == (report.model, report.parameters)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert sum(x.nbytes for x in found.weights) == found.nbytes
    assert sum(file.nbytes for file in found.files) > found.nbytes
    assert found.bits_per_parameter == pytest.approx(8 * found.nbytes / report.parameters)
    everything = {x.name for x in found.weights}
    assert {x.name for x in report.kept} <= everything | {x.removesuffix(".weight") for x in everything}
    config = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    method = config.get("quant_method") or found.format
    assert found.format == ("gguf" if any(path.glob("*.gguf")) else method)


@pytest.mark.parametrize("path", DIRECTORIES, ids=lambda path: path.name)
def test_headers_alone_tell_the_same_of_sound_files(path: Path) -> None:
    whole, fast = quiet(path), quiet(path, fast=True)
    assert whole.complete
    assert not fast.complete
    assert dataclasses.replace(fast, complete=True).to_dict() == whole.to_dict()
    assert "numbers were not looked at" in text(fast)


@OWN_DATA
def test_headers_alone_read_the_first_matrix_of_each_kind(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("gptq_w4_g64_asym_zero0")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.scales"].fill_(torch.nan)
        tensors["lm_head.weight"].fill_(torch.nan)

    change(path, damage)
    assert quiet(path, fast=True).problems == ()
    assert places(quiet(path)) == {"model.layers.1.self_attn.q_proj", "lm_head.weight"}


@pytest.mark.parametrize("name", ["code-dense", "code-moe"])
def test_a_model_in_full_precision(name: str) -> None:
    found, model = quiet(DATA / name), load_model(DATA / name, progress=False)
    state = model.state_dict()
    assert found.format == "full precision"
    assert (found.problems, found.remarks, found.quantized) == ((), (), ())
    assert found.bits_per_parameter == 16
    rows = {x.name: x.shape for x in found.weights}
    assert {x.removesuffix(".weight"): s for x, s in rows.items()} == {
        x.removesuffix(".weight"): tuple(t.shape) for x, t in state.items()
    }
    assert sum(x.nbytes for x in found.weights) == sum(t.nbytes for t in state.values())
    assert "problems            none found" in text(found)


def test_shared_and_transposed_weights(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    found = quiet(tmp_path)
    rows = {x.name: x for x in found.weights}
    assert rows["lm_head"].note == "shared with transformer.wte.weight"
    assert rows["lm_head"].nbytes == 0
    assert rows["transformer.h.0.attn.c_attn"].kind == "Conv1D"
    assert rows["transformer.h.0.attn.c_attn"].shape[0] == 3 * rows["transformer.h.0.attn.c_attn"].shape[1]
    assert found.problems == ()


def test_a_model_in_the_own_format(tmp_path: Path) -> None:
    model: Any = fxquant.quantize(load_model(DATA / "code-moe", progress=False), "int4-g64", progress=False)
    fxquant.save(model, tmp_path / "own", recipe="int4-g64", shard_size=1_000_000)
    found, report = quiet(tmp_path / "own"), fxquant.report(model)
    assert (found.format, dict(found.settings), found.problems) == ("fxquant", {"recipe": "int4-g64"}, ())
    assert len(found.files) > 2
    assert {x.name: x.scheme for x in found.quantized} == {x.name: x.scheme for x in report.layers}
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert sum(x.nbytes for x in found.weights) == found.nbytes

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".0.self_attn.q_proj.scales"):
                tensors[name][:2, 0] = torch.inf
        tensors.pop("model.layers.1.self_attn.q_proj.codes", None)
        tensors.pop("model.norm.weight", None)

    for file in (tmp_path / "own").glob("*.safetensors"):
        change(tmp_path / "own", damage, file.name)
    assert told(quiet(tmp_path / "own")) == {
        (Q_PROJ, "holds nan or inf: 2 of 1024 scales"),
        (
            "model.layers.1.self_attn.q_proj",
            f"{tmp_path / 'own'} holds no tensor model.layers.1.self_attn.q_proj.codes",
        ),
        ("model.norm.weight", "the model has it, and the files do not"),
    }
    (tmp_path / "own" / "fxquant.json").write_text("{}")
    found = quiet(tmp_path / "own")
    assert "has the format None" in found.problems[0].text
    assert {x.name for x in found.weights} > {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.codes"}


@OWN_DATA
def test_everything_that_is_wrong_is_found_at_once(copied: Any) -> None:
    path = copied("gptq_w4_g64_asym_zero0")
    scales = load_file(path / "model.safetensors")[f"{Q_PROJ}.scales"].numel()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.scales"]
        del tensors["model.norm.weight"]
        tensors["nonsense.weight"] = torch.zeros(3)
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(5)
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.self_attn.k_proj.g_idx"][3] = 99
        tensors[f"{Q_PROJ}.scales"][0] = torch.nan
        tensors["model.layers.1.self_attn.q_proj.scales"][0] = 0
        tensors["model.layers.1.self_attn.v_proj.scales"].fill_(0)
        tensors["model.embed_tokens.weight"][7] = torch.inf

    change(path, damage)
    (path / "pytorch_model.bin").write_bytes(b"never loaded")
    (path / "other.safetensors").write_bytes(b"")
    found = quiet(path)
    up = "model.layers.0.mlp.up_proj"
    columns = scales // load_file(path / "model.safetensors")[f"{Q_PROJ}.scales"].shape[0]
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    zeros = load_file(path / "model.safetensors")["model.layers.1.self_attn.v_proj.scales"].numel()
    groups = {one for one in told(found) if one[0].endswith("k_proj")}
    assert told(found) - groups == {
        (up, f"{up} has g_idx, qweight, qzeros, and lacks scales"),
        ("model.norm.weight", "the model has it, and the files do not"),
        ("nonsense.weight", "the files have it, and the model does not"),
        ("model.layers.0.input_layernorm.weight", f"it is [5] in the files, and [{embedding.shape[1]}] in the model"),
        (Q_PROJ, f"holds nan or inf: {columns} of {scales} scales"),
        ("model.layers.1.self_attn.v_proj", f"all scales are 0: {zeros} are, and so are its weights"),
        ("model.embed_tokens.weight", f"holds nan or inf: {embedding.shape[1]} of {embedding.numel()} numbers"),
    }
    assert len(groups) == 2
    assert all("'g_idx' names groups 0 to 99" in one[1] for one in groups)
    remarks = {one.place: one.text for one in found.remarks}
    assert remarks.keys() == {"pytorch_model.bin", "other.safetensors", "model.layers.1.self_attn.q_proj", ""}
    assert remarks["model.layers.1.self_attn.q_proj"].startswith(f"{columns} of {scales} scales are 0")
    rows = {x.name: x for x in found.weights}
    assert rows[up].note == rows["model.layers.1.self_attn.k_proj"].note == "quantized; cannot be read"
    assert rows["model.norm.weight"].note == "not in the files"
    assert rows["model.layers.0.input_layernorm.weight"].note == "not of this shape in the files"
    assert rows["model.layers.0.mlp.down_proj"].scheme == "uint4-g64-fp16"
    # in the table, layers with the same fault share a line
    shown = text(found)
    assert "model.layers.{0..1}.self_attn.k_proj (2x)   GPTQ weight" in shown
    assert "model.layers.0.self_attn.k_proj   " in text(found, full=True)


@OWN_DATA
def test_config_and_tensors_that_contradict_each_other(copied: Any) -> None:
    path = copied("moe_qwen3_ct_w4a16_g64")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["re:.*[qk]_proj"]
    (path / "config.json").write_text(json.dumps(config))
    change(path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight_scale"))
    found = quiet(path)
    assert places(found) == {
        *(f"model.layers.{layer}.self_attn.{one}_proj" for layer in (0, 1) for one in "qk"),
        "model.layers.1.mlp.experts.2.up_proj",
    }
    assert sum("it leaves out" in one.text for one in found.problems) == 4
    rows = {x.name: x for x in found.weights}
    assert rows["model.layers.1.mlp.experts.2.up_proj"].scheme is None
    assert rows["model.layers.1.mlp.experts.1.up_proj"].scheme == "int4-g64"
    assert rows["lm_head"].note == "left out: ignore has lm_head"


@OWN_DATA
def test_experts_that_are_missing(copied: Any) -> None:
    path = copied("moe_qwen3_ct_w4a16_g64")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".1.mlp.experts.3." in name]:
            del tensors[name]

    change(path, damage)
    found = quiet(path)
    want = {f"model.layers.1.mlp.experts.3.{one}_proj" for one in ("gate", "up", "down")}
    assert told(found) == {(name, "the model has it, and the files do not") for name in want}


@OWN_DATA
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda p: (p / "config.json").unlink(), "nothing else tells what model it is"),
        (lambda p: (p / "config.json").write_text("[]"), "holds a list"),
        (lambda p: change_config(p, architectures=["Nope"]), "model class 'Nope'"),
        (lambda p: change_config(p, quantization_config={"quant_method": "nope"}), "quant_method is 'nope'"),
        (
            lambda p: [change_config(p, quantization_config=None), (p / "quantize_config.json").unlink()],
            "look quantized",
        ),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 99), "cannot read"),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
            "git lfs pull",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "holds no safetensors files"),
        (lambda p: change_config(p, vocab_size=2**40), "that its config describes has"),
        (lambda p: change_config(p, num_hidden_layers=10**9), "has num_hidden_layers 1e+09"),
        (lambda p: (p / "generation_config.json").write_text("{"), "it cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_a_problem_among_others(edit: Any, problem: str, copied: Any) -> None:
    path = copied("gptq_w4_g64_asym_zero0")
    change(path, lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    (path / "x.bin").write_bytes(b"")
    edit(path)
    found = quiet(path)
    assert sum(problem in one.text for one in found.problems) == 1
    assert {one.place for one in found.remarks} >= {"x.bin", ""}
    if found.files:  # the numbers are looked at all the same
        assert "lm_head.weight" in places(found)
    if not found.model:
        assert all(x.kind == "" for x in found.weights)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["problems"]
    assert problem.split()[0] in text(found)


@OWN_DATA
def test_shards_and_their_index(copied: Any) -> None:
    path = copied("gptq_w4_g64_asym_zero0")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::3]}, path / file, metadata={"format": "pt"})
    weights = {name: files[i] for i in range(3) for name in names[i::3]}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    whole = quiet(path)
    assert (whole.problems, len(whole.files)) == ((), 3)
    wrong = {**weights, names[0]: files[1], "absent.weight": files[0], "evil": "../x.safetensors", "odd": 7}
    wrong["long"] = "a" * 5000 + ".safetensors"
    index.write_text(json.dumps({"weight_map": wrong}))
    assert told(quiet(path)) == {
        (names[0], f"the index has it in {files[1]}, and it is in {files[0]}"),
        ("absent.weight", f"the index has it in {files[0]}, and no file of it that can be read does"),
        (index.name, f"3 of {len(wrong)} entries name no file of its directory"),
    }
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weights.items() if file != files[2]}}))
    assert (files[2], "it looks like a part of the model, and the index does not name it: it is not read") in told(
        quiet(path)
    )
    index.write_text(json.dumps({"weight_map": weights}))
    (path / files[1]).unlink()
    (path / files[2]).write_bytes((path / files[2]).read_bytes()[:-1])
    found = quiet(path)
    assert {files[1], files[2]} <= places(found)
    # what the other shard holds is told all the same, and no tensor of the lost ones is told of twice
    assert {one.place for one in found.problems if one.text.startswith("the index has it in")} == {
        *names[1::3],
        *names[2::3],
    }


@OWN_DATA
def test_names_that_a_terminal_would_obey_are_spelled_out(copied: Any) -> None:
    path = copied("gptq_w4_g64_asym_zero0")
    change(path, lambda tensors: tensors.update({"\x1b[2Jclear\u202e.weight": torch.zeros(2)}))
    shown = text(quiet(path))
    assert r"\x1b[2Jclear\u202e.weight" in shown
    assert "\x1b" not in shown


@pytest.fixture
def gguf(copied: Any) -> Path:
    return next(copied("gguf_q4_k").glob("*.gguf"))


@OWN_DATA
def test_a_gguf_file_with_several_faults(gguf: Path) -> None:
    headers = open_gguf(gguf).headers
    data = bytearray(gguf.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"))
    norm, matrix = headers["output_norm.weight"], headers["blk.1.ffn_up.weight"]
    data[norm.offset : norm.offset + 4] = b"\x00\x00\xc0\x7f"
    data[matrix.offset : matrix.offset + 2] = b"\x00\x7e"  # the scale of the first block
    embedding = headers["token_embd.weight"]
    data[embedding.offset : embedding.offset + 2] = b"\x00\x7c"
    gguf.write_bytes(data)
    for path in (gguf, gguf.parent):
        found = quiet(path)
        blocks = matrix.nbytes // 144
        assert told(found) == {
            (f"{Q_PROJ}.weight", "the model has it, and the file does not: blk.0.attn_q.weight is missing"),
            ("blk.0.attn_z.weight", "the file has it, and the model does not"),
            ("output_norm.weight", f"holds nan or inf: 1 of {norm.shape[0]} numbers"),
            ("model.layers.1.mlp.up_proj", f"holds nan or inf: 1 of {blocks} scale_scales"),
            ("token_embd.weight", f"holds nan or inf: 1 of {embedding.nbytes // 144} scale_scales"),
        }
        assert found.schemes == {"q4_k": 14}
        assert (found.format, found.variant, found.tokenizer) == ("gguf", "Q4_K_S", True)


@OWN_DATA
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"GGUF", b"GGUG", "does not begin with GGUF"),
        (b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama", None, "architecture"),
        (b"llama.block_count", b"llama.block_cownt", "block_count"),
    ],
)
def test_a_gguf_file_whose_header_is_damaged(old: bytes, new: bytes | None, problem: str, gguf: Path) -> None:
    data = gguf.read_bytes()
    assert old in data
    (gguf.parent / "config.json").unlink()
    gguf.write_bytes(data.replace(old, old[:-5] + b"lamma" if new is None else new))
    found = quiet(gguf)
    assert any(problem in one.text for one in found.problems)
    assert found.model == ""
    assert bool(found.weights) == (b"GGUG" not in gguf.read_bytes())


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no directory and no file"):
        inspect(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"is a file\n  give the directory"):
        inspect(tmp_path / "config.json")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileError, match="holds 2 GGUF files"):
        inspect(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_have_problems_and_no_others_do(kind: str, tmp_path: Path) -> None:
    """What `load` refuses has a problem; what it loads has none, but for numbers that are not finite."""
    folders = [folder for folder in DIRECTORIES if kind in kinds_for(folder)]
    for number in range(3):
        folder, path = folders[number % len(folders)], tmp_path / str(number)
        shutil.copytree(folder, path, ignore=shutil.ignore_patterns("expected.safetensors", "meta.json"))
        for file in (path, *path.iterdir()):
            file.chmod(0o755)
        if KINDS[kind](path, random.Random(f"inspect {kind} {number}")) is None:
            continue
        try:
            fxquant.load(path, progress=False)
            loads = True
        except FxquantError:
            loads = False
        found = quiet(path)
        serious = [one for one in found.problems if not one.text.startswith(("holds nan", "all scales are 0"))]
        assert loads == (not serious), (folder.name, kind, number, found.problems)
        assert json.dumps(found.to_dict(), allow_nan=False)
        assert text(found)
        assert text(found, full=True)


def test_bits_are_those_of_the_scheme() -> None:
    found = quiet(DATA / "checkpoints" / "bnb_nf4")
    for one in found.quantized:
        n, k = one.shape
        assert one.bits == pytest.approx(8 * Scheme.parse(str(one.scheme)).nbytes(n, k) / (n * k))
    total = sum(one.bits * one.weights for one in found.quantized)
    assert found.bits_per_weight == pytest.approx(total / sum(one.weights for one in found.quantized))


def test_it_is_public() -> None:
    assert fxquant.inspect is inspect
    assert repr(quiet(DATA / "code-dense")).endswith("full precision, LlamaForCausalLM, nothing quantized, 0 problems")
