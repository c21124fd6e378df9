"""`load` on checkpoints that real libraries wrote: their weights, their logits, compiled, written and read again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from load_table import weight_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant
from fxquant.codecs import dequantize
from fxquant.errors import FileError, FxquantError
from fxquant.expert_modules import QExperts
from fxquant.loading import load
from fxquant.model_files import read_model, save
from fxquant.modules import QLinear

# Another folder of checkpoints of the same kind, each with meta.json and expected.safetensors.
FOLDER = Path(os.environ.get("FXQUANT_ZOO_DIRECTORIES", Path(__file__).parent / "data" / "checkpoints"))
DIRECTORIES = sorted(path.parent for path in FOLDER.glob("*/meta.json"))
TOLERANCES = {"abs": 1.0, "ulp32 of max|W|": 2.0**-23}


def test_there_are_checkpoints() -> None:
    assert len(DIRECTORIES) >= 4


@pytest.fixture(scope="module", params=DIRECTORIES, ids=lambda path: path.name)
def checkpoint(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], dict[str, Tensor], Any]:
    path: Path = request.param
    meta = json.loads((path / "meta.json").read_text())
    return path, meta, load_file(path / "expected.safetensors"), load(path, dtype=torch.float32, progress=False)


def test_weights_are_those_of_the_reference(checkpoint: Any) -> None:
    _, meta, expected, model = checkpoint
    tolerance = meta["tolerance"]["weights"] * TOLERANCES[meta["tolerance"]["unit"]]
    names = [name for name in expected if name not in ("input_ids", "expected_logits", "native_logits")]
    assert names
    for name in names:
        wanted, found = expected[name].float(), weight_of(model, name)
        found = found[: len(wanted)]  # of stacked experts, the first
        scale = 1.0 if meta["tolerance"]["unit"] == "abs" else float(wanted.abs().max())
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * scale, name


def test_logits_are_those_of_the_reference(checkpoint: Any) -> None:
    _, meta, expected, model = checkpoint
    with torch.no_grad():
        found = model(expected["input_ids"].long(), use_cache=False).logits
    wanted = expected["expected_logits"]
    assert (found - wanted).norm() <= meta["logits_tolerance"] * wanted.norm()


def test_compiles_as_one_graph(checkpoint: Any) -> None:
    _, _, expected, model = checkpoint
    ids = expected["input_ids"].long()
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_report_tells_what_is_in_it(checkpoint: Any) -> None:
    _, _, _, model = checkpoint
    found = fxquant.report(model)
    assert len(found.layers) >= 14
    assert found.bits_per_weight < 9
    quantized = [m for m in model.modules() if isinstance(m, (QLinear, QExperts))]
    assert not any(isinstance(p, nn.Parameter) and p.ndim == 3 for m in quantized for p in m.parameters())


def test_written_and_read_again_it_is_the_same_bit_for_bit(checkpoint: Any, tmp_path: Path) -> None:
    _, _, expected, model = checkpoint
    save(model, tmp_path / "own")
    again = load(tmp_path / "own", progress=False)
    one, two = model.state_dict(), again.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), two[name].contiguous().view(-1).view(torch.uint8)
        )
    assert read_model(tmp_path / "own").config.model_type == model.config.model_type
    ids = expected["input_ids"].long()
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, again(ids, use_cache=False).logits)


def test_dequantized_it_is_a_plain_model(checkpoint: Any) -> None:
    path, _, expected, _ = checkpoint
    model: Any = load(path, dtype=torch.float32, progress=False)
    ids = expected["input_ids"].long()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        fxquant.dequantize(model)
        after = model(ids, use_cache=False).logits
    assert not any(isinstance(m, (QLinear, QExperts)) for m in model.modules())
    assert (after - before).norm() < 0.5 * before.norm()  # activations are in full precision now


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_planes_do_not_depend_on_the_dtype(dtype: torch.dtype | None) -> None:
    path = DIRECTORIES[0]
    model, other = load(path, dtype=torch.float32, progress=False), load(path, dtype=dtype, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            twin: Any = other.get_submodule(name)
            assert all(torch.equal(plane, twin.planes[key]) for key, plane in module.planes.items())
            assert twin.weight.dtype == (dtype or other.dtype)


def test_a_checkpoint_in_full_precision_is_loaded_as_it_is() -> None:
    path = Path(__file__).parent / "data" / "code-moe"
    model: Any = load(path, progress=False)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path)
    for (name, one), (_, two) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    fxquant.quantize(model, "int4-g64", progress=False)
    assert fxquant.report(model).coverage > 0.9


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER / "moe_qwen3_ct_w4a16_g64", tmp_path / "model")
    (tmp_path / "model" / "expected.safetensors").unlink()
    return tmp_path / "model"


def change_tensors(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        key = next(key for key in tensors if key.endswith(name.replace("__", ".")))
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.skipif("FXQUANT_ZOO_DIRECTORIES" in os.environ, reason="needs a checkpoint of tests/data")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "holds no config.json"),
        (lambda p: (p / "config.json").write_text("[]"), "holds a list, not an object"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 99), "cannot read"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "are pickles, which could run code"),
        (lambda p: change_config(p, architectures=["Nonsense"]), "model class 'Nonsense'"),
        (lambda p: change_config(p, num_hidden_layers=1), "no linear for|does not have"),
        (lambda p: change_config(p, num_hidden_layers=3), "lacks weights of the model"),
        (lambda p: change_config(p, moe_intermediate_size=64), "its weight_shape"),
        (lambda p: change_config(p, num_experts=2, num_local_experts=2), "no linear for|does not have"),
        (lambda p: change_tensors(p, **{"0.down_proj.weight_scale": None}), "weight_scale"),
        (lambda p: change_tensors(p, **{"q_proj.weight_scale": torch.ones(3, 3)}), "has to be"),
        (lambda p: change_tensors(p, **{"norm.weight": torch.ones(5)}), r"is \[5\] in the files"),
        (
            lambda p: change_tensors(p, **{"model.norm.weight": None}),
            "lacks weights of the model: 1\n  model.norm.weight",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(change: Any, message: str, copied: Path) -> None:
    change(copied)
    with pytest.raises(FxquantError, match=message):
        load(copied, progress=False)


def test_shards_and_their_index(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copied / file, metadata={"format": "pt"})
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    model, whole = load(copied, progress=False), load(FOLDER / "moe_qwen3_ct_w4a16_g64", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    for bad in ("../b.safetensors", "/etc/passwd", "c.safetensors", "c" * 300 + ".safetensors", 7):
        index.write_text(json.dumps({"weight_map": {"x": bad}}))
        with pytest.raises(FileError, match=r"files of its own directory|lacks 1 of its 1 files"):
            load(copied, progress=False)


def test_experts_of_which_some_are_in_full_precision(copied: Path) -> None:
    """Mixed layers: what the file has as floats stays floats."""
    whole: Any = load(copied, dtype=torch.float32, progress=False)
    experts: Any = whole.get_submodule("model.layers.0.mlp.experts")
    tensors = load_file(copied / "model.safetensors")
    prefix = "model.layers.0.mlp.experts.1.up_proj"
    for key in [key for key in tensors if key.startswith(f"{prefix}.")]:
        del tensors[key]
    tensors[f"{prefix}.weight"] = experts.weight_of("up_proj", 1).to(torch.bfloat16)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    mixed: Any = load(copied, dtype=torch.float32, progress=False)
    found: Any = mixed.get_submodule("model.layers.0.mlp.experts")
    assert found.scheme_of("up_proj", 1) is None
    assert found.scheme_of("up_proj", 0) is not None
    assert torch.equal(found.weight_of("up_proj", 1), tensors[f"{prefix}.weight"].float())
    scheme = found.scheme_of("down_proj", 1)
    n, k = found.weight_of("down_proj", 1).shape
    assert torch.equal(found.weight_of("down_proj", 1), dequantize(found.planes_of("down_proj", 1), scheme, n, k))
