"""Models quantized by `from_pretrained`, in use: saved, compiled, placed, trained on top of, dequantized."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_models import PARTLY, assert_same, load, logits, source_in
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fxquant
from fxquant import FxQuantConfig
from fxquant.errors import FileError, ModelError
from fxquant.install import record_of
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


def test_no_weight_is_held_in_full_precision(sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is planes before the next one is read."""
    from fxquant.integrations.arrivals import Arrivals

    held: list[int] = []
    take = Arrivals.take

    def counting(self: Arrivals, *args: Any) -> bool:
        taken = take(self, *args)
        layers = self.model.get_submodule("model.layers")
        modules = [module for module in layers.modules() if isinstance(module, (nn.Linear, MixtralExperts))]
        held.append(sum(p.numel() for module in modules for p in module.parameters() if not p.is_meta))
        return taken

    monkeypatch.setattr(Arrivals, "take", counting)
    model = load(sources("mixtral"), "int8")
    assert len(held) == 12  # two layers with q, k, v, o and two stacks of experts
    assert max(held) == 0
    assert not [module for module in model.modules() if isinstance(module, MixtralExperts)]


BARE = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError as error:
        print("refused", "ignore_mismatched_sizes" in str(error))
    else:
        print("loaded")
assert not [name for name in sys.modules if name.startswith("fxquant")]
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "dbrx", "gemma2"])
def test_what_was_quantized_in_memory_is_saved(kind: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """As what `from_pretrained` quantized; and what `load` read, and not what is dequantized again."""
    model: Any = AutoModelForCausalLM.from_pretrained(sources(kind))
    fxquant.quantize(model, "int8", progress=False)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same(model, again)
    assert_same(load(sources(kind), "int8"), again)
    fxquant.save(model, tmp_path / "own")
    read: Any = fxquant.load(tmp_path / "own")
    read.save_pretrained(tmp_path / "read")
    assert_same(load(tmp_path / "read"), again)
    fxquant.dequantize(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "full")
    assert_same(model, load(tmp_path / "full"))


def test_without_fxquant_nothing_is_loaded(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers itself would warn, and fill the weights that it does not find with random numbers."""
    kinds = ["gpt2", "mixtral", "dbrx"]
    for kind in kinds:
        load(sources(kind), "int8").save_pretrained(tmp_path / kind)
    command = [sys.executable, "-c", BARE, *(str(tmp_path / kind) for kind in kinds)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == ["refused True"] * len(kinds), run.stderr[-1000:]


def test_importing_fxquant_does_not_import_transformers() -> None:
    script = "import sys, fxquant; fxquant.Recipe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_module_reload_registers_again(quantized: Path) -> None:
    module = importlib.import_module("fxquant.integrations.transformers")
    importlib.reload(module)
    assert type(load(quantized).hf_quantizer) is module.FxQuantizer


def test_another_class_of_the_same_model(quantized: Path, tmp_path: Path) -> None:
    whole = load(quantized)
    base, info = AutoModel.from_pretrained(quantized, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert torch.equal(base.layers[0].mlp.up_proj.codes, whole.model.layers[0].mlp.up_proj.codes)
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert_same(again.model, whole.model)


def test_shards(sources: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(sources("qwen3_moe"), "int4-g32")
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert_same(model, load(tmp_path / "saved"))


def test_new_weights_stay_as_they_are(sources: Callable[[str], Path]) -> None:
    """A classification head that no checkpoint has is to be trained, not to be rounded."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        sources("llama"), num_labels=3, quantization_config=FxQuantConfig("int8")
    )
    assert type(model.score) is nn.Linear
    entry = record_of(model).plan["score"]
    assert entry.scheme is None
    assert "newly initialised" in entry.reason
    assert isinstance(model.model.layers[0].mlp.up_proj, QLinear)


def test_a_missing_bias_is_initialised(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sources("gpt2"), tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("h.0.attn.c_attn.bias"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    model = load(tmp_path / "gpt2", "int8")
    assert isinstance(model.transformer.h[0].attn.c_attn, QLinear)
    assert not model.transformer.h[0].attn.c_attn.bias.any()
    assert model.transformer.h[1].attn.c_attn.bias.any()


def test_other_names_in_the_checkpoint(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """A mapping of names that the caller gives holds while quantizing, and not for what was saved then."""
    shutil.copytree(sources("llama"), tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    renamed = {name.replace(".mlp.", ".ffn."): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    model = load(tmp_path / "llama", "int8", key_mapping={r"\.ffn\.": ".mlp."})
    assert_same(model, load(sources("llama"), "int8"))
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, load(tmp_path / "saved"))


def test_generate_compiles_by_itself(quantized: Path) -> None:
    model = load(quantized)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(sum("fxquant.linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    prompt = torch.tensor([[5, 17, 42]])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(prompt, **options, disable_compile=True, cache_implementation="static")
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    got = model.generate(prompt, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
    assert compiled == [14]


def test_dequantize(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """By transformers' way and by ours; what is saved then is a model in full precision like any other."""
    one, two = load(sources("mixtral"), "int8"), load(sources("mixtral"), "int8")
    want = logits(one)
    one.dequantize()
    fxquant.dequantize(two)
    assert_same(one, two)
    torch.testing.assert_close(logits(one), want, rtol=1e-3, atol=1e-4)
    for name, model in {"one": one, "two": two}.items():
        model.save_pretrained(tmp_path / name)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        assert set(load_file(tmp_path / name / "model.safetensors")) == set(
            load_file(sources("mixtral") / "model.safetensors")
        )
        assert_same(one, load(tmp_path / name))


def test_what_is_saved_is_what_the_model_is_then(sources: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(sources("llama"), "int8")
    model.to(torch.bfloat16)
    fxquant.dequantize(model)
    fxquant.quantize(model, [("*.mlp.*", "int4-g32")], progress=False)
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, load(tmp_path / "saved"))


def test_device_map(sources: Callable[[str], Path]) -> None:
    pytest.importorskip("accelerate")
    want = load(sources("qwen3_moe"), "int4-g32")
    assert_same(want, load(sources("qwen3_moe"), "int4-g32", device_map={"": "cpu"}))
    assert_same(want, load(sources("qwen3_moe"), "int4-g32", device_map="auto"))


def test_the_room_that_device_map_reckons_with_is_that_of_planes(sources: Callable[[str], Path]) -> None:
    from fxquant.integrations.transformers import FxQuantizer

    path = sources("mixtral")
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    quantizer = FxQuantizer(FxQuantConfig(PARTLY), pre_quantized=False)
    quantizer.update_dtype(torch.float32)
    quantizer.preprocess_model(model)
    sizes = {n: quantizer.param_element_size(model, n, p) * p.numel() for n, p in model.named_parameters()}
    real = load(path, PARTLY)
    members = sum(b.nbytes for name, b in real.named_buffers() if name.endswith("_experts"))
    held = sum(t.nbytes for t in real.state_dict().values())
    assert round(sum(sizes.values())) == held - members
    largest = max(p.nbytes for name, p in model.named_parameters() if "experts" in name)
    assert quantizer.adjust_max_memory({0: 10**9, "cpu": 10**9}) == {0: 10**9 - 2 * largest, "cpu": 10**9}


def test_nothing_is_quantized_on_disk(sources: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ModelError, match="on disk"):
        load(sources("llama"), "int8", device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_configs_are_plain_data() -> None:
    recipe = fxquant.Recipe(
        [fxquant.Rule("*.mlp.*", "int4-g32", type="Linear", min_size=8, scale="absmax"), ("*", None)], misfit="keep"
    )
    config = FxQuantConfig(recipe)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["quant_method"] == "fxquant"
    again = FxQuantConfig.from_dict(data)
    assert again.to_dict() == config.to_dict()
    assert FxQuantConfig(again.recipe).to_dict() == config.to_dict()
    assert FxQuantConfig("INT4").recipe == "int4"
    with pytest.raises(FileError, match=r"does not know: \['new'\]"):
        FxQuantConfig.from_dict({**data, "new": 1})


def test_one_config_for_several_models(sources: Callable[[str], Path], tmp_path: Path) -> None:
    config = FxQuantConfig("int8")
    one = AutoModelForCausalLM.from_pretrained(sources("llama"), quantization_config=config)
    two = AutoModelForCausalLM.from_pretrained(sources("gpt2"), quantization_config=config)
    assert config.modules is None
    one.save_pretrained(tmp_path / "one")
    assert_same(one, load(tmp_path / "one"))
    assert "transformer.h.0.mlp.c_fc" in two.config.quantization_config.modules["linears"]


def test_peft(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Adapters train on top of planes, come back from their file, and can be merged into a dequantized model."""
    peft = pytest.importorskip("peft")
    prompt = torch.tensor([[5, 17, 42, 9]])
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load(sources("llama"), "int4-g32"), config)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer.base_layer, QLinear)
    model(prompt, labels=prompt).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(".lora_" in name for name in trained)
    assert all(p.grad.any() for name, p in model.named_parameters() if name in trained)
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = peft.PeftModel.from_pretrained(load(sources("llama"), "int4-g32"), tmp_path / "adapter").eval()
    with torch.no_grad():
        want = model.eval()(prompt).logits
        assert torch.equal(again(prompt).logits, want)
        merged = fxquant.dequantize(again).merge_and_unload()
        torch.testing.assert_close(merged(prompt).logits, want, rtol=1e-3, atol=1e-4)


def test_adapters_of_transformers_are_saved_alone(sources: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(sources("llama"), "int8")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4
