"""Models of every architecture, quantized and not, written as GGUF: against fxquant.load, gguf and transformers."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import gguf_contents as checkpoints
import gguf_examples as examples
import pytest
import torch
from gguf_contents import Checkpoint
from torch import Tensor

import fxquant
from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.expert_modules import QExperts
from fxquant.gguf import gguf_config, gguf_plain, gguf_tensors, gguf_weights, open_gguf
from fxquant.modules import QLinear
from fxquant.pretrained import skeleton
from fxquant.scheme import PlaneSpec, Scheme

gguf = pytest.importorskip("gguf")
DIRECTORIES = os.environ.get("FXQUANT_ZOO_DIRECTORIES")
DATA = Path(__file__).parent / "data" / "checkpoints"
IDS = torch.arange(3, 60)[None]
SMALL = [Scheme.parse(name) for name in ("q4_0", "q8_0", "q5_1", "mxfp4", "iq4_nl", "int8-fp16", "nvfp4")]
NOT_READ_BY_TRANSFORMERS = {
    "mixtral": "it takes mixtures for llama",
    "granite": "unknown to it",
    "gemma": "unknown to it",
    "falcon, new": "leaves the rows of fused q, k, v as they are",
    "gpt-oss": "fails on rotary settings of any such file",
}


def mixed(model: Any) -> Checkpoint:
    """In several schemes, or the nearest ones to them that fit; experts of one projection in one."""
    turn = itertools.cycle(SMALL)
    stacks: dict[str, Scheme] = {}

    def scheme_of(name: str, n: int, k: int) -> Scheme:
        owner, _, rest = name.partition(".experts.")
        key = owner + rest.partition(".")[2]
        if key not in stacks:
            stacks[key] = next(turn)
        return stacks[key]

    with torch.no_grad():
        return checkpoints.quantized(model, scheme_of)


def planes_in(model: torch.nn.Module) -> dict[str, tuple[Scheme, dict[str, Tensor]]]:
    """Of every quantized matrix, by its name."""
    found: dict[str, tuple[Scheme, dict[str, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            found[name] = module.scheme, module.planes
        elif isinstance(module, QExperts):
            for e, projection, scheme in module.matrices():
                if scheme is not None:
                    found[f"{name}.{e}.{projection.name}"] = scheme, module.planes_of(projection.name, e)
    return found


def loaded(path: Path) -> Any:
    model: Any = fxquant.load(path, dtype=torch.float32, progress=False)
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("name", examples.MODELS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    checkpoint = mixed(model)
    checkpoints.write(tmp_path / "model.gguf", checkpoint)
    again = loaded(tmp_path / "model.gguf")
    found = planes_in(again)
    assert len(found) >= 8
    assert found.keys() == checkpoint.contents.matrices.keys()
    for key, (scheme, planes) in found.items():
        matrix = checkpoint.contents.matrices[key]
        if scheme == matrix.scheme:
            assert all(torch.equal(planes[plane], value) for plane, value in checkpoint.weights[key].items()), key
        else:
            # one scale for a row is as many as there are blocks
            assert (str(matrix.scheme), str(scheme)) == ("int8-fp16", "q8_0")
    state = again.state_dict()
    for key in checkpoint.tensors.keys() & state.keys():
        # norms of gemma have had 1 added
        error = 1e-7 if name.startswith("gemma") else 0
        assert torch.allclose(state[key], checkpoint.tensors[key], rtol=0, atol=error), key
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", examples.MODELS)
def test_gguf_decodes_what_llama_cpp_would_have(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    checkpoint = mixed(model)
    checkpoints.write(tmp_path / "model.gguf", checkpoint)
    wanted = examples.gguf_tensors(model, examples.MODELS[name][0])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    scales = {f"{key.removesuffix('.weight')}.scale" for key, one in found.items() if one.tensor_type.name == "NVFP4"}
    assert found.keys() - scales == wanted.keys()
    for key, value in wanted.items():
        values = torch.from_numpy(gguf.quants.dequantize(found[key].data, found[key].tensor_type).copy())
        if found[key].tensor_type.name == "NVFP4":
            scale = torch.from_numpy(found[f"{key.removesuffix('.weight')}.scale"].data.copy())
            values = values * scale.view(-1, *[1] * (values.ndim - 1))
        assert torch.allclose(values, value, rtol=1e-6, atol=0), key
        # llama.cpp has no code for others
        assert value.ndim > 1 or found[key].tensor_type.name == "F32", key


@pytest.mark.parametrize("name", [name for name in examples.MODELS if name not in NOT_READ_BY_TRANSFORMERS])
def test_transformers_reads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = examples.build(name)
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda key, n, k: Scheme.parse("q8_0" if "o_proj" in key else "q4_0"))
    checkpoints.write(tmp_path / "model.gguf", checkpoint)
    # without a config it takes heads for 128 wide, and leaves out sizes of experts
    again: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=model.config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_type(name: str, tmp_path: Path) -> None:
    scheme = Scheme.parse(LAYOUTS[name].scheme)
    model = examples.build("llama", **WIDE)
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda key, n, k: scheme)
    found, _ = checkpoints.write(tmp_path / "model.gguf", checkpoint)
    assert {spec.type_name for spec in found.specs.values()} == {name, "F32"}
    again = loaded(tmp_path / "model.gguf")
    for key, (stored, planes) in planes_in(again).items():
        assert stored == scheme
        assert all(torch.equal(planes[plane], value) for plane, value in checkpoint.weights[key].items()), key


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_floats_keep_their_type_where_llama_cpp_allows(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model = examples.build("qwen2moe")
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: None, dtype)
    found, _ = checkpoints.write(tmp_path / "model.gguf", checkpoint)
    types = {name: spec.type_name for name, spec in found.specs.items()}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up_exps", "ffn_gate_shexp")} == {kind}
    assert types["token_embd.weight"] == types["output.weight"] == kind
    for name in ("attn_q.bias", "attn_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"):
        assert types[f"blk.1.{name}"] == "F32"
    again = loaded(tmp_path / "model.gguf").state_dict()
    assert all(torch.equal(again[key], value.float()) for key, value in checkpoint.tensors.items())


def one_by_one(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """Experts as checkpoints of mixtral on the hub have them, tensors of their own; and what the model calls them."""
    names, tensors = {}, {}
    for key, value in checkpoint.tensors.items():
        owner, found, rest = key.partition("mlp.experts.")
        if not found:
            names[key.replace("mlp.gate", "block_sparse_moe.gate")] = key
            continue
        stacked = "." not in rest
        for e, matrix in enumerate(value) if stacked else [(int(rest.partition(".")[0]), value)]:
            parts = {rest.split(".")[-2]: matrix} if not stacked else {rest: matrix}
            if rest == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, one in parts.items():
                w = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[part]
                name = f"{owner}block_sparse_moe.experts.{e}.{w}.weight"
                names[name], tensors[name] = f"{owner}mlp.experts.{e}.{part}.weight", one
    tensors |= {name: checkpoint.tensors[own] for name, own in names.items() if name not in tensors}
    plain = {name: PlaneSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    contents = dataclasses.replace(checkpoint.contents, plain=plain)
    return Checkpoint(contents, checkpoint.weights, tensors), names


@pytest.mark.parametrize("part", ["nothing", "up_proj", "down_proj"])
def test_experts_that_are_tensors_of_their_own(part: str, tmp_path: Path) -> None:
    model = examples.build("mixtral")
    with torch.no_grad():
        whole = checkpoints.quantized(model, lambda key, n, k: SMALL[0] if key.endswith(part) else None)
    checkpoint, names = one_by_one(whole)
    assert sum("experts" in name for name in names) == (18 if part == "nothing" else 12)
    found, _ = checkpoints.write(tmp_path / "model.gguf", checkpoint, names)
    kinds = {one: found.specs[f"blk.0.ffn_{one}_exps.weight"].type_name for one in ("gate", "up", "down")}
    assert kinds == {one: "Q4_0" if part == f"{one}_proj" else "F32" for one in ("gate", "up", "down")}
    wanted, file = examples.gguf_tensors(model, "llama"), open_gguf(tmp_path / "model.gguf")
    for name, spec in found.specs.items():
        if spec.type_name == "F32":
            assert torch.equal(file.tensor(name), wanted[name]), name


def test_tensors_that_no_file_needs_are_left_out() -> None:
    for name, extra in (("llama, tied", "lm_head.weight"), ("gpt2", "transformer.h.0.attn.bias")):
        with torch.no_grad():
            checkpoint = checkpoints.quantized(examples.build(name), lambda *_: None)
        before = gguf_tensors(checkpoint.contents, {})
        plain = {**checkpoint.contents.plain, extra: PlaneSpec((96, 64), torch.float32)}
        after = gguf_tensors(dataclasses.replace(checkpoint.contents, plain=plain), {})
        assert after.specs == before.specs


def of_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    file = open_gguf(path)
    config = AutoConfig.for_model(**gguf_config(file))
    model: Any = skeleton(AutoModelForCausalLM._model_mapping[type(config)], config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    matrices, weights = {}, {}
    for stored in gguf_weights(file, shapes):
        n, k = shapes[f"{stored.name}.weight"]
        scheme, planes = stored.read({own: file.tensor(p.name, p.index) for own, p in stored.pieces.items()}, n, k)
        matrices[stored.name], weights[stored.name] = Matrix(stored.name, stored.name, n, k, scheme), planes
    tensors = {name: tensor[...] for name, tensor in gguf_plain(file, shapes).items()}
    plain = {name: PlaneSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return Checkpoint(Contents(path, config, model, matrices, plain), weights, tensors)


ZOO = [DATA / "gguf_q4_k"] + [
    Path(DIRECTORIES or "") / f"gguf_{name}" for name in ("q4_0", "q8_0", "q6_k") if DIRECTORIES
]


@pytest.mark.parametrize("folder", ZOO, ids=lambda folder: folder.name)
def test_files_of_llama_cpp_are_written_again(folder: Path, tmp_path: Path) -> None:
    path = next(folder.glob("*.gguf"))
    checkpoint = of_gguf(path)
    found, described = checkpoints.write(tmp_path / "model.gguf", checkpoint, tokenizer=path)
    before, after = open_gguf(path), open_gguf(tmp_path / "model.gguf")
    assert before.headers.keys() == after.headers.keys()
    for name, header in before.headers.items():
        if header.type_name == after.headers[name].type_name:
            assert torch.equal(before.tensor(name), after.tensor(name)), name
        else:
            assert found.specs[name].type_name == "F32"
    for key, value in before.metadata.items():
        if key.startswith((f"{before.architecture}.", "tokenizer.")):
            assert described.metadata[key] == pytest.approx(value), key
