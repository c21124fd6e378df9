"""Recipes, checkpoints and configs that are not right: an error each, and nothing loaded as garbage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_models import PARTLY, assert_same, edit_weights, load, source_in
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from fxquant import FxQuantConfig
from fxquant.errors import FileError, FxquantError, ModelError, RecipeError, SchemeError
from fxquant.modules import QLinear


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return source_in(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def quantized(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that was quantized and saved."""
    path = tmp_path_factory.mktemp("quantized") / "llama"
    load(sources("llama"), "int8").save_pretrained(path)
    return path


@pytest.fixture
def saved(quantized: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(quantized, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("int3.5", RecipeError, "no preset and no scheme"),
        ("int4-g999", SchemeError, "g999"),
        ([("*.nothing", "int4")], RecipeError, "nothing"),
        ({"rules": []}, RecipeError, "without rules"),
        ({"rules": [{"match": "*"}]}, RecipeError, "each rule has"),
        ("int8+int8-static", ModelError, "take calibration"),
    ],
)
def test_recipes_that_do_not_fit(
    recipe: Any, error: type[Exception], message: str, sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read then."""
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._load_pretrained_model", lambda *args: pytest.fail("loaded")
    )
    with pytest.raises(error, match=message):
        load(sources("llama"), recipe)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("kind", "name"), [("llama", "layers.0.mlp.up_proj.weight"), ("mixtral", "experts.1.w2")])
def test_weights_that_no_scheme_can_store(
    kind: str, name: str, value: float, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(sources(kind), tmp_path / "bad")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for full, tensor in tensors.items() if name in full)[0, 0] = value

    edit_weights(tmp_path / "bad", spoil)
    with pytest.raises(ModelError, match=r"1 weights of the checkpoint cannot be quantized: .* holds inf or nan"):
        load(tmp_path / "bad", "int8")


def test_half_of_the_experts(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("mixtral"), tmp_path / "half")
    edit_weights(tmp_path / "half", lambda t: [t.pop(n) for n in list(t) if ".0." in n and n.endswith(".w2.weight")])
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.down_proj is not in the checkpoint"):
        load(tmp_path / "half", "int8")


def test_a_weight_of_another_shape(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers refuses it, or, when told to, makes a new one, which stays as it is."""
    shutil.copytree(sources("llama"), tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(tmp_path / "other", lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises((RuntimeError, ModelError), match=r"ignore_mismatched_sizes|is \[127, 64\], the model has"):
        load(tmp_path / "other", "int8")
    model = load(tmp_path / "other", "int8", ignore_mismatched_sizes=True)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, QLinear)


def set_method(path: Path, **config: Any) -> None:
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "quantization_config": config}))


def test_checkpoints_that_something_else_has_quantized(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("llama"), tmp_path / "other")
    set_method(tmp_path / "other", quant_method="fp8")
    with pytest.raises(ValueError, match="is quantized with FineGrainedFP8Config but you are passing a FxQuantConfig"):
        load(tmp_path / "other", "int8")
    set_method(tmp_path / "other", quant_method="unheard-of")
    edit_weights(tmp_path / "other", lambda t: t.update({n: w.to(torch.int8) for n, w in t.items() if w.dim() > 1}))
    with pytest.raises(FileError, match=r"as torch\.int8: the checkpoint is quantized already"):
        load(tmp_path / "other", "int8")
    edit_weights(tmp_path / "other", lambda t: [t.update({f"{n}.packed": t.pop(n)}) for n in list(t) if "proj" in n])
    edit_weights(tmp_path / "other", lambda t: t.update({n: w.float() for n, w in t.items()}))
    with pytest.raises(ModelError, match="none of the 14 weights that are to be quantized is in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other", quantization_config=FxQuantConfig("int8"))


def test_the_recipe_of_a_quantized_checkpoint_stands(saved: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = load(saved, "int4")
    assert_same(model, load(saved))


def test_a_directory_that_fxquant_wrote_is_for_fxquant(saved: Path) -> None:
    set_method(saved, quant_method="fxquant", format=2)
    with pytest.raises(FileError, match=r"read by fxquant\.load"):
        load(saved)


PLANE = "model.layers.0.mlp.up_proj.codes"


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PLANE), f"lacks 1 of the 28 tensors of its quantized modules: {PLANE}"),
        (lambda t: t.update({PLANE: t[PLANE][:-1].clone()}), f"{PLANE} is torch.int8"),
        (lambda t: t.update({PLANE: t[PLANE].to(torch.int16)}), f"{PLANE} is torch.int16"),
        (
            lambda t: t.update({PLANE.replace("codes", "scales"): torch.ones(128, 1).double()}),
            "scales is torch.float64",
        ),
        (lambda t: t.clear(), "lacks 28 of the 28 tensors"),
    ],
)
def test_damaged_weights(change: Callable[[Any], Any], message: str, ignore: bool, saved: Path) -> None:
    edit_weights(saved, change)
    with pytest.raises(FileError, match=message):
        load(saved, ignore_mismatched_sizes=ignore)


def damage(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        config = config[parent]
    config[leaf] = value


LAYER = "modules/linears/model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 99, "reads format"),
        ("modules", [], "does not tell which modules"),
        ("modules", None, "does not tell which modules"),
        ("modules/linears", 5, "must be an object"),
        ("modules/experts", {"model.layers.0.mlp": {"dtype": "float32", "schemes": {}}}, "has no experts of the name"),
        ("modules/linears/model.layers.9.mlp.up_proj", {"scheme": "int8", "dtype": "float32"}, "has no linear of this"),
        (LAYER, {"scheme": "int8-g7", "dtype": "float32"}, "cannot be int8-g7"),
        (LAYER, {"scheme": "int4-g32", "dtype": "float32"}, "the config of the checkpoint says"),
        (f"{LAYER}/scheme", ["int8"], "needs a scheme"),
        (f"{LAYER}/dtype", "int8", "needs a dtype"),
        ("modules/linears", {}, "tells of no module"),
        ("surprise", 1, r"does not know: \['surprise'\]"),
    ],
)
def test_damaged_configs(path: str, value: Any, message: str, saved: Path) -> None:
    data = json.loads((saved / "config.json").read_text())
    damage(data["quantization_config"], path, value)
    (saved / "config.json").write_text(json.dumps(data))
    with pytest.raises(FxquantError, match=message):
        load(saved)


def test_experts_that_a_stack_does_not_have(sources: Callable[[str], Path], tmp_path: Path) -> None:
    load(sources("mixtral"), PARTLY).save_pretrained(tmp_path / "saved")
    edit_weights(tmp_path / "saved", lambda t: [w.fill_(77) for n, w in t.items() if n.endswith("_experts")])
    with pytest.raises(FileError, match="contradicts its config"):
        load(tmp_path / "saved")
