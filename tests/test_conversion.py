"""`convert`: what is written tensor by tensor is what `quantize` and `save` write, and what other formats can hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_models import PARTLY, edit_weights, source_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor

import fxquant
from fxquant.codecs import dequantize
from fxquant.conversion import convert
from fxquant.errors import FileError, FxquantError, ModelError, RecipeError
from fxquant.model_files import save
from fxquant.model_report import report
from fxquant.pretrained import load_model
from fxquant.stored_models import open_stored
from fxquant.unfinished import JOURNAL, Unfinished, unfinished_path

DEMO = Path(__file__).parent / "data"
ZOO = Path(os.environ.get("FXQUANT_ZOO_DIRECTORIES", DEMO / "checkpoints"))
DIRECTORIES = sorted(path.parent for path in ZOO.glob("*/meta.json"))
KINDS = ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "dbrx", "deepseek_v3", "jetmoe"]
ONE = ("qwen3_moe", "jetmoe")
"""Converted with the first recipe alone: what recipes do to experts that are stored like theirs, others show."""
RECIPES: dict[str, Any] = {
    "int4": "int4",
    "partly": [*PARTLY[:-1], ("*", "int8")],
    "mixed": [("*.layers.0.*", "nf4-dq"), ("*", "fp8")],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return source_in(tmp_path_factory.mktemp("sources"))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def assert_same_files(a: Path, b: Path) -> None:
    """The same tensors in the same files, and the same texts."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for file in a.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name
            continue
        one, two = load_file(file), load_file(b / file.name)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
            assert torch.equal(bits(tensor), bits(two[name])), name


def refused(model: Any, recipe: Any) -> str | None:
    """Quantize; what is said against it."""
    try:
        fxquant.quantize(model, recipe, progress=False)
    except RecipeError as error:
        return str(error)
    return None


def weights_in(path: Path) -> dict[str, Tensor]:
    """Every quantized matrix, decoded, by what the model calls it."""
    stored = open_stored(path)
    return {
        own: dequantize(planes, scheme, *stored.shapes[own])
        for own in stored.matrices
        for scheme, planes in [stored.planes(own)]
    }


@pytest.mark.parametrize(("kind", "recipe"), [(k, r) for k in KINDS for r in (["int4"] if k in ONE else RECIPES)])
def test_files_are_those_of_a_model_in_memory(
    kind: str, recipe: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(sources(kind), progress=False)
    rules = RECIPES[recipe]
    if refusal := refused(model, rules):
        with pytest.raises(RecipeError) as found:
            convert(sources(kind), tmp_path / "files", recipe=rules, progress=False)
        assert str(found.value) == refusal
        assert not list(tmp_path.iterdir())
        return
    save(model, tmp_path / "memory", recipe=str(rules), shard_size=60_000)
    done = convert(sources(kind), tmp_path / "files", recipe=rules, progress=False, shard_size=60_000)
    assert_same_files(tmp_path / "memory", tmp_path / "files")
    assert done.model is not None
    mine, wanted = report(done.model), report(model)
    assert {x.name: (x.scheme, x.error) for x in mine.layers} == {x.name: (x.scheme, x.error) for x in wanted.layers}
    assert {x.name: x.reason for x in mine.kept} == {x.name: x.reason for x in wanted.kept}
    assert len(done.matrices) == len(wanted.layers)


@pytest.mark.parametrize("to", ["fxquant", "compressed-tensors", "bitsandbytes", "gptq"])
def test_a_tied_head_that_is_quantized(to: str, tmp_path: Path) -> None:
    """It is no longer tied, in any format; the embeddings stay."""
    config = tiny_model("llama").config
    config.tie_word_embeddings = True
    type(tiny_model("llama"))(config).save_pretrained(tmp_path / "source")
    recipe = [("lm_head", "int8"), ("*.layers.*", "int8")]
    convert(tmp_path / "source", tmp_path / "own", recipe=recipe, progress=False)
    memory = fxquant.quantize(load_model(tmp_path / "source", progress=False), recipe, progress=False)
    want = fxquant.load(tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(memory.state_dict().values(), want.state_dict().values(), strict=True))
    convert(tmp_path / "own", tmp_path / "out", to, progress=False)
    found: Any = fxquant.load(tmp_path / "out", progress=False)
    assert "lm_head" in weights_in(tmp_path / "out")
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, want(ids).logits, rtol=2e-2, atol=2e-2)


def test_what_save_pretrained_wrote_is_a_source(sources: Callable[[str], Path], tmp_path: Path) -> None:
    model: Any = load_model(sources("mixtral"), progress=False)
    fxquant.quantize(model, "int4-g32", progress=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    save(model, tmp_path / "own")
    assert convert(tmp_path / "saved", tmp_path / "again", progress=False).exact
    for one in (loaded, fxquant.load(tmp_path / "again")):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), one.state_dict().values(), strict=True)
        )


def test_experts_made_at_the_same_time(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Plain tensors are converted in one model, by one thread at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        recipe = [("*.experts.*", "keep"), ("*", "int4-g32")]
        for number in range(4):
            convert(sources("mixtral"), tmp_path / str(number), recipe=recipe, progress=False)
    finally:
        torch.set_num_threads(threads)
    first = tensors_in(tmp_path / "0")
    for number in range(1, 4):
        assert all(torch.equal(first[name], t) for name, t in tensors_in(tmp_path / str(number)).items())


def test_experts_that_transformers_would_not_read(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="which transformers cannot read"):
        convert(sources("mixtral"), tmp_path / "out", "bitsandbytes", recipe="int8", progress=False)
    assert not list(tmp_path.iterdir())
    done = convert(sources("mixtral"), tmp_path / "bnb", "bitsandbytes", recipe="nf4", exclude=["*.experts.*"])
    assert done.matrices
    done = convert(sources("granitemoe"), tmp_path / "ct", "compressed-tensors", recipe="int8", progress=False)
    assert "it would fill them with random numbers" in done.notes[-1]
    done = convert(sources("mixtral"), tmp_path / "stacked", "compressed-tensors", recipe="int8", progress=False)
    assert not any("random numbers" in note for note in done.notes)


def test_a_config_without_dtype(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("llama"), tmp_path / "llama")
    edit_weights(tmp_path / "llama", lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    convert(tmp_path / "llama", tmp_path / "out", recipe="int8", progress=False)
    assert tensors_in(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.float16


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = DEMO / "code-moe"
    convert(source, tmp_path / "out", recipe="nf4", progress=False)
    convert(source, tmp_path / "gptq", "gptq", recipe="int4-g64-fp16", progress=False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "gptq" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_every_format_becomes_the_own_one(directory: Path, tmp_path: Path) -> None:
    done = convert(directory, tmp_path / "out", progress=False)
    assert done.exact
    assert not [one for one in done.matrices if one.reason]
    before = fxquant.load(directory, progress=False).state_dict()
    after = fxquant.load(tmp_path / "out").state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(bits(tensor), bits(after[name])), name


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_what_is_called_exact_is(directory: Path, to: str, tmp_path: Path) -> None:
    """In both directions: weights that are called exact are, others are off by the error that is told."""
    if to == "bitsandbytes" and ("moe" in directory.name or "gptoss" in directory.name):
        with pytest.raises(FileError, match="transformers cannot read in bitsandbytes"):
            convert(directory, tmp_path / "out", to, progress=False)
        return
    done = convert(directory, tmp_path / "out", to, progress=False)
    before, after = weights_in(directory), weights_in(tmp_path / "out")
    names = {weight.name: own for own, weight in open_stored(directory).matrices.items()}
    dtype = str(open_stored(directory).source.config.dtype).removeprefix("torch.")
    written = {names[one.name]: one for one in done.matrices if one.after != dtype}
    assert written.keys() == after.keys()
    for own, one in written.items():
        if one.error is None:
            assert torch.equal(before[own], after[own]), own
        else:
            wanted = before[own].double()
            error = float((after[own].double() - wanted).square().sum() / wanted.square().sum())
            assert error == pytest.approx(one.error, rel=1e-3, abs=1e-12), own
    fxquant.load(tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("scheme", "formats"),
    [
        ("int4-g32-fp16", ["gptq", "awq", "compressed-tensors", "gguf"]),
        ("uint4-g64-fp16", ["gptq", "awq", "compressed-tensors"]),
        ("int8-fp16", ["gptq", "compressed-tensors"]),
        ("nf4", ["bitsandbytes"]),
        ("nf4-dq", ["bitsandbytes"]),
        ("mxfp4", ["compressed-tensors", "gguf"]),
        ("fp8", ["compressed-tensors"]),
        ("q4_k", ["gguf"]),
    ],
)
def test_there_and_back_is_exact(
    scheme: str, formats: list[str], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """From a checkpoint of our own to another format and back: the same planes, whichever format is in between."""
    source = tmp_path / "source"
    write_wide_llama(source)
    convert(source, tmp_path / "own", recipe=[("*.layers.*", scheme)], progress=False)
    place = tmp_path / "own"
    for to in formats:
        out = tmp_path / f"{to}.gguf" if to == "gguf" else tmp_path / to
        assert convert(place, out, to, progress=False).exact, to
        place = out
    assert convert(place, tmp_path / "back", progress=False).exact
    before, after = weights_in(tmp_path / "own"), weights_in(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[own], after[own]) for own in before)
    first, second = fxquant.load(tmp_path / "own"), fxquant.load(tmp_path / "back")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def write_wide_llama(path: Path) -> None:
    """Of dimensions that the blocks of all formats divide."""
    config = tiny_model("llama").config
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 256, 512, 4
    config.num_key_value_heads, config.head_dim, config.vocab_size = 2, 64, 256
    config.dtype = torch.bfloat16
    model = type(tiny_model("llama"))(config).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.05)
    model.save_pretrained(path)


def test_a_quantized_checkpoint_gets_a_recipe(tmp_path: Path) -> None:
    """What is quantized already is decoded; what the recipe keeps is in full precision in the end."""
    directory = next(path for path in DIRECTORIES if "config.json" in {p.name for p in path.iterdir()})
    recipe = [("*.layers.0.*", "int8"), ("*", None)]
    with pytest.raises(FileError, match="is quantized already: 14 matrices"):
        convert(directory, tmp_path / "out", recipe=recipe, progress=False)
    done = convert(directory, tmp_path / "out", recipe=recipe, requantize=True, progress=False)
    before = weights_in(directory)
    model: Any = fxquant.load(tmp_path / "out")
    for own, weight in before.items():
        found = model.get_submodule(own).weight
        if ".layers.0." in own:
            error = next(one.error for one in done.matrices if one.name == own)
            off = (found.float() - weight).square().sum() / weight.square().sum()
            assert error is not None
            assert float(off) == pytest.approx(error, rel=0.2, abs=1e-4)
        else:
            assert torch.equal(found, weight.to(found.dtype))


KILLED = """
import os, signal, sys
from fxquant.conversion import convert
from fxquant.unfinished import Unfinished
write, left = Unfinished.write, int(sys.argv[3])

def writing(self, unit, tensors, note):
    global left
    write(self, unit, tensors, note)
    self.sync()
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Unfinished.write = writing
convert(sys.argv[1], sys.argv[2], recipe="int4", progress=False, shard_size=200_000)
"""


def test_a_killed_process_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant.conversion_choices import Choices

    source, out = DEMO / "code-moe", tmp_path / "out"
    for count in (5, 7):
        command = [sys.executable, "-c", KILLED, str(source), str(out), str(count)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
        assert not out.exists()
    done = (unfinished_path(out) / JOURNAL).read_text().count('"unit"')
    assert done >= 12
    read: list[str] = []
    original = Choices.read

    def reading(self: Choices, name: str) -> Any:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Choices, "read", reading)
    resumed = convert(source, out, recipe="int4", progress=False, shard_size=200_000)
    first = len(read)
    whole = convert(source, tmp_path / "whole", recipe="int4", progress=False, shard_size=200_000)
    assert 0 < first < len(read) - first
    assert resumed.to_dict()["matrices"] == whole.to_dict()["matrices"]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def interrupted(source: Path, out: Path, count: int) -> Path:
    """What is left of a conversion that was interrupted after so many units."""
    write, left = Unfinished.write, iter(range(count))

    def writing(self: Unfinished, *arguments: Any) -> None:
        write(self, *arguments)
        self.sync()
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "write", writing)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, recipe="int4", progress=False, shard_size=200_000)
    assert not out.exists()
    return unfinished_path(out)


def test_what_was_begun_for_something_else_is_begun_anew(tmp_path: Path) -> None:
    source, out = DEMO / "code-dense", tmp_path / "out"
    interrupted(source, out, 3)
    convert(source, out, recipe="nf4", progress=False)
    convert(source, tmp_path / "whole", recipe="nf4", progress=False)
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["journal", "short", "header"])
def test_damaged_work_is_begun_anew(damage: str, tmp_path: Path) -> None:
    source, out = DEMO / "code-dense", tmp_path / "out"
    folder = interrupted(source, out, 3)
    file = next(folder.glob("*.safetensors"))
    if damage == "journal":
        (folder / JOURNAL).write_text('{"unit"\nnot json\n')
    elif damage == "short":
        os.truncate(file, file.stat().st_size - 1)
    else:
        with file.open("r+b") as opened:
            opened.seek(8)
            opened.write(b"?")
    convert(source, out, recipe="int4", progress=False, shard_size=200_000)
    convert(source, tmp_path / "whole", recipe="int4", progress=False, shard_size=200_000)
    assert_same_files(out, tmp_path / "whole")


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    unfinished_path(out).mkdir()
    with (
        FileLock(unfinished_path(out) / "lock"),
        pytest.raises(FileError, match="being written by another process"),
    ):
        convert(DEMO / "code-dense", out, recipe="int4", progress=False)
    assert unfinished_path(out).exists()


def test_a_weight_that_cannot_be_stored(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("llama"), tmp_path / "llama")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")

    edit_weights(tmp_path / "llama", spoil)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj holds inf or nan"):
        convert(tmp_path / "llama", tmp_path / "out", recipe="int8", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "is not quantized\n  give a recipe"),
        ({"to": "gpqt", "recipe": "int4"}, "no format 'gpqt' to write; did you mean gptq"),
        ({"recipe": "int8+int8-static"}, "static activation scales, which take calibration"),
        ({"to": "gguf", "recipe": "int4"}, "ends in .gguf"),
        ({"to": "gpt-oss", "recipe": "mxfp4"}, "the format is that of gpt-oss, and this is llama"),
    ],
)
def test_what_cannot_be_written(
    arguments: dict[str, Any], said: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(FxquantError) as error:
        convert(sources("llama"), tmp_path / "out", progress=False, **arguments)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_places_that_are_taken(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("llama"), source)
    with pytest.raises(FileError, match="what is to be read"):
        convert(source, source, recipe="int8", force=True, progress=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for force in (False, True):
        with pytest.raises(FileError):
            convert(source, tmp_path / "taken", recipe="int8", force=force, progress=False)
    convert(source, tmp_path / "out", recipe="int8", progress=False)
    with pytest.raises(FileError, match="--force"):
        convert(source, tmp_path / "out", recipe="nf4", progress=False)
    convert(source, tmp_path / "out", recipe="nf4", force=True, progress=False)
    assert "nf4" in (tmp_path / "out" / "fxquant.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "taken"]


def test_the_working_directory_is_not_replaced(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="the directory that this process is in"):
        convert(sources("llama"), ".", recipe="int8", progress=False)
    convert(sources("llama"), "out", recipe="int8", progress=False)
    convert("out", "model.gguf", "gguf", progress=False)
    with pytest.raises(FileError, match="what is to be read"):
        convert(".", "model.gguf", "gguf", force=True, progress=False)


def test_tensors_that_are_missing_or_too_many(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("llama"), tmp_path / "less")
    edit_weights(tmp_path / "less", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(FileError, match=r"lacks weights of the model: 1\n  model.norm.weight"):
        convert(tmp_path / "less", tmp_path / "out", recipe="int8", progress=False)
    shutil.copytree(sources("llama"), tmp_path / "linear")
    edit_weights(tmp_path / "linear", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(FileError, match=r"lacks weights of the model: model.layers.0.mlp.up_proj"):
        convert(tmp_path / "linear", tmp_path / "out", recipe="int8", progress=False)
    shutil.copytree(sources("llama"), tmp_path / "more")
    edit_weights(tmp_path / "more", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(FileError, match=r"does not have: 1\n  model.extra.weight"):
        convert(tmp_path / "more", tmp_path / "out", recipe="int8", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_report_is_readable(tmp_path: Path) -> None:
    done = convert(DEMO / "code-dense", tmp_path / "out", "gptq", recipe="nf4", progress=False)
    text = str(done)
    assert "model.layers.{0..3}.self_attn.q_proj (4x)" in text
    assert "nf4" in text
    assert json.dumps(done.to_dict())
    assert "<table" in done._repr_html_()
    assert all(one.error for one in done.matrices)


def test_files_are_laid_out_as_safetensors_does(tmp_path: Path) -> None:
    from fxquant.scheme import PlaneSpec
    from fxquant.tensor_files import create_files, plan_safetensors, write_tensor

    tensors = {
        "ä.weight": torch.randn(3, 5, dtype=torch.float64),
        "b": torch.randn(7).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "c": torch.arange(11, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "codes": torch.randn(2, 3).to(torch.float8_e4m3fn),
    }
    specs = {name: PlaneSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    plan = plan_safetensors(specs, "model")
    create_files(plan, tmp_path)
    for name in reversed(tensors):
        write_tensor(plan, tmp_path, name, tensors[name])
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_size == (tmp_path / "reference.safetensors").stat().st_size
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(bits(file.get_tensor(name)), bits(tensor))
    with pytest.raises(FileError, match=r"and its place in model\.safetensors 11"):
        write_tensor(plan, tmp_path, "c", torch.zeros(3))
