"""Directories that are not what they should be: each an error that says where, never a model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxquant
from fxquant.errors import FileError, FxquantError
from fxquant.model_files import WEIGHTS, read_model, save
from fxquant.model_index import INDEX

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model"
    save(fxquant.quantize(tiny_model("llama"), "int8", progress=False), path)
    return path


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    """A model of its own for each test, to be damaged."""
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


def change_index(path: Path, **changes: Any) -> None:
    data = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps(data | changes))


def first_linear(path: Path, **changes: Any) -> dict[str, Any]:
    linears: dict[str, Any] = json.loads((path / INDEX).read_text())["linears"]
    name = next(iter(linears))
    linears[name] = {**linears[name], **changes}
    return linears


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / INDEX).write_text("{"), "is not valid JSON"),
        (lambda p: (p / INDEX).write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda p: (p / INDEX).write_text("[" * 100_000), "is not valid JSON"),
        (lambda p: (p / INDEX).write_text("[]"), "holds a list, not an object"),
        (lambda p: (p / INDEX).unlink(), "is not a model that fxquant wrote"),
        (lambda p: change_index(p, format=3), "has the format 3; this version of fxquant reads format 2"),
        (lambda p: change_index(p, linears=[]), "'linears' must be an object, got list"),
        (lambda p: change_index(p, shared={"a": 3}), "must name another tensor, got 3"),
        (lambda p: change_index(p, linears=first_linear(p, scheme="int9")), "unknown scheme 'int9'"),
        (lambda p: change_index(p, linears=first_linear(p, scheme=4)), "needs a scheme, got"),
        (lambda p: change_index(p, linears=first_linear(p, dtype="int8")), "needs a dtype"),
        (lambda p: change_index(p, linears=first_linear(p, dtype=["float32"])), "needs a dtype"),
        (lambda p: change_index(p, linears={"model.layers.0.self_attn.qproj": ENTRY}), "did you mean"),
        (lambda p: change_index(p, linears={"model.embed_tokens": ENTRY}), "has no linear of this name"),
        (lambda p: change_index(p, linears={"": ENTRY}), "has no linear of this name"),
        (lambda p: change_index(p, linears={}), "holds tensors that the model does not have"),
        (lambda p: change_index(p, linears=first_linear(p, scheme="nf4")), "lacks tensors|the model needs"),
        (lambda p: change_index(p, linears=first_linear(p, scheme="int8-g7")), "cannot|not a multiple|the model needs"),
        (lambda p: change_index(p, shared={"model.norm.weight": "nowhere"}), "disagree on shared tensors: nowhere"),
        (lambda p: change_index(p, shared={"nowhere": "model.norm.weight"}), "disagree on shared tensors: nowhere"),
        (lambda p: change_index(p, model="Nonsense"), "the model class 'Nonsense'"),
        (lambda p: change_index(p, model="os"), "the model class 'os'"),
        (lambda p: change_index(p, model="__class__"), "the model class '__class__'"),
        (lambda p: change_index(p, model="AutoModel"), "the model class 'AutoModel'"),
        (lambda p: change_index(p, model="GPT2LMHeadModel"), "describes no GPT2LMHeadModel|cannot be int8"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda p: (p / "config.json").unlink(), "holds no config.json"),
        (lambda p: change_config(p, num_hidden_layers=1), "the model has no linear of this name"),
        (lambda p: change_config(p, intermediate_size=10**7), "that its config describes has"),
        (lambda p: (p / WEIGHTS).unlink(), "cannot read"),
        (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 64), "cannot read"),
        (lambda p: (p / WEIGHTS).write_bytes(b""), "cannot read"),
        (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-5]), "cannot read"),
        (lambda p: change_tensor(p, lambda t: t[:-1]), "the model needs"),
        (lambda p: change_tensor(p, lambda t: t.to(torch.uint8)), "the model needs"),
        (lambda p: change_tensor(p, lambda t: t.float()), "the model needs"),
        (lambda p: change_tensor(p, lambda t: None), "lacks tensors of the model"),
        (lambda p: change_tensor(p, lambda t: t, "model.layers.9.codes"), "holds tensors that the model does not have"),
    ],
)
def test_files_that_lie_are_refused(change: Callable[[Path], Any], message: str, written: Path) -> None:
    change(written)
    with pytest.raises(FileError, match=message):
        read_model(written)


ENTRY = {"scheme": "int8", "dtype": "float32"}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def with_experts(tmp_path: Path) -> Path:
    """Experts of which each layer has two schemes, so that there are members to lie about."""
    recipe = [("*.experts.{0,2}.*", "int4-g32"), ("*", "int8")]
    model = fxquant.quantize(tiny_model("mixtral"), recipe, progress=False)
    save(model, tmp_path / "model")
    return tmp_path / "model"


def change_experts(path: Path, name: str = EXPERTS, **changes: Any) -> None:
    experts = json.loads((path / INDEX).read_text())["experts"]
    entry = experts.pop(EXPERTS)
    change_index(path, experts={**experts, name: entry | changes})


def change_members(path: Path, members: list[int]) -> None:
    tensors = load_file(path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("_experts"))
    save_file(tensors | {name: torch.tensor(members)}, path / WEIGHTS)


def all_in(*spellings: str, projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Any]:
    return {name: dict.fromkeys(spellings, "all") for name in projections}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: change_index(p, experts=[]), "'experts' must be an object, got list"),
        (lambda p: change_index(p, experts={EXPERTS: []}), "needs schemes, an object for each projection"),
        (lambda p: change_index(p, experts={}), "holds tensors that the model does not have"),
        (lambda p: change_experts(p, schemes=3), "needs schemes, an object"),
        (lambda p: change_experts(p, schemes={"gate_proj": "int8"}), "needs schemes, an object"),
        (lambda p: change_experts(p, schemes={"gate_proj": {"int8": 3}}), "are numbers or 'all', got 3"),
        (lambda p: change_experts(p, schemes={"gate_proj": {"int8": [True]}}), "are numbers or 'all'"),
        (lambda p: change_experts(p, schemes={"gate_proj": {"int8": [9]}}), "matrices that these experts do not have"),
        (lambda p: change_experts(p, schemes={"gate_proj": {"int8": [-1]}}), "matrices that these experts do not have"),
        (lambda p: change_experts(p, schemes={"gat_proj": {"int8": "all"}}), "matrices that these experts do not have"),
        (lambda p: change_experts(p, schemes=all_in("int8", "nf4")), "has two schemes for all.gate_proj"),
        (
            lambda p: change_experts(p, schemes={"up_proj": {"int8": [1], "nf4": "all"}}),
            "has two schemes for 1.up_proj",
        ),
        (lambda p: change_experts(p, schemes=all_in("int44")), "did you mean"),
        (lambda p: change_experts(p, schemes=all_in("int8-g7")), "not a multiple"),
        (lambda p: change_experts(p, schemes=all_in("nf4")), "lacks tensors of the model"),
        (lambda p: change_experts(p, dtype="int8"), "needs a dtype"),
        (lambda p: change_experts(p, name="model.layers.1.mlp.expert"), "has no experts of the name.*did you mean"),
        (lambda p: change_experts(p, name="model.layers.1.mlp"), "has no experts of the name"),
        (lambda p: change_members(p, [0, 3]), r"are \[0, 3\], not the experts \[0, 2\]"),
        (lambda p: change_members(p, [0, 99]), r"are \[0, 99\], not the experts"),
        (lambda p: change_members(p, [0]), "the model needs"),
    ],
)
def test_experts_that_lie_are_refused(change: Callable[[Path], Any], message: str, with_experts: Path) -> None:
    change(with_experts)
    with pytest.raises(FileError, match=message):
        read_model(with_experts)


def change_config(path: Path, **changes: Any) -> None:
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | changes))


def change_tensor(path: Path, change: Callable[[Tensor], Tensor | None], rename: str = "") -> None:
    tensors = load_file(path / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".codes"))
    new = change(tensors.pop(name))
    if new is not None:
        tensors[rename or name] = new
    save_file(tensors, path / WEIGHTS)


def test_an_index_of_gigabytes_is_not_read(written: Path) -> None:
    with (written / INDEX).open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(FileError, match="no JSON of a checkpoint is that large"):
        read_model(written)


def test_no_file_can_make_it_run_out_of_errors(written: Path) -> None:
    """Random bytes at random places of the index and of the header end in an error or in the same model."""
    reference = read_model(written)
    random = torch.Generator().manual_seed(0)
    for name in (INDEX, WEIGHTS) * 15:
        original = (written / name).read_bytes()
        damaged = bytearray(original)
        place = int(torch.randint(min(len(damaged), 3000), (), generator=random))
        damaged[place] = int(torch.randint(256, (), generator=random))
        (written / name).write_bytes(damaged)
        try:
            read = read_model(written)
        except FxquantError:
            pass
        else:
            assert {n for n, _ in read.named_modules()} == {n for n, _ in reference.named_modules()}
        (written / name).write_bytes(original)
