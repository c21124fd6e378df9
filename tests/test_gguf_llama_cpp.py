"""llama.cpp itself reads what is written: the same logits, the same tokens. Skipped without llama-cpp-python."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf_contents as checkpoints
import gguf_examples as examples
import gguf_tokenizers as tokenizers
import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.scheme import Scheme

llama: Any = pytest.importorskip("llama_cpp.llama_cpp")
CORPUS = [(Path(__file__).parent / "data" / "sentences.txt").read_text(encoding="utf-8")[:30000]]
IDS = list(range(3, 80))
GELU = ("gemma", "gemma2", "gemma3", "starcoder2", "gpt2", "falcon", "falcon, new", "gpt-oss")
"""llama.cpp has tables of float16 for their activations."""
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64}


def opened(path: Path, *, vocabulary: bool = False) -> Any:
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers, settings.vocab_only = 0, vocabulary
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp does not load {path}"
    return model


def logits_of(path: Path) -> Tensor:
    """`[T, V]`, by llama.cpp."""
    model = opened(path)
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 128
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(IDS))]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.from_numpy(np.stack(rows))


def error(path: Path, model: Any) -> float:
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    return float((logits_of(path) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", examples.MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    model = examples.build(name)
    with torch.no_grad():
        checkpoints.write(tmp_path / "model.gguf", checkpoints.quantized(model, lambda *_: None))
    assert error(tmp_path / "model.gguf", model) < (2e-3 if name in GELU else 1e-5)


SCHEMES = ("q4_0", "mxfp4", "nvfp4")
# llama.cpp does not go on where there are biases behind NVFP4
QUANTIZED = [(n, s) for n in examples.MODELS for s in SCHEMES if (n, s) != ("llama with biases", "nvfp4")]


@pytest.mark.parametrize(("name", "scheme"), QUANTIZED)
def test_logits_of_quantized_models(name: str, scheme: str, tmp_path: Path) -> None:
    model = examples.build(name)
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: Scheme.parse(scheme))
    checkpoints.write(tmp_path / "model.gguf", checkpoint)
    # llama.cpp quantizes what is multiplied by such weights; what is routed may go to other experts then
    assert error(tmp_path / "model.gguf", model) < (
        0.2 if name in ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss") else 0.05
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_type(name: str, tmp_path: Path) -> None:
    model = examples.build("llama", **WIDE)
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: Scheme.parse(LAYOUTS[name].scheme))
    checkpoints.write(tmp_path / "model.gguf", checkpoint)
    assert error(tmp_path / "model.gguf", model) < 0.05


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"long_factor": [1.0 + i / 8 for i in range(8)], "short_factor": [1.0 + i / 64 for i in range(8)]}
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn with attention": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.25}}),
    "partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONG},
        },
    ),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_embeddings(kind: str, tmp_path: Path) -> None:
    name, settings = ROTARY[kind]
    model = examples.build(name, **settings)
    with torch.no_grad():
        checkpoints.write(tmp_path / "model.gguf", checkpoints.quantized(model, lambda *_: None))
    assert error(tmp_path / "model.gguf", model) < 1e-5


@pytest.mark.parametrize("kind", [*tokenizers.BYTE_LEVEL, *tokenizers.SENTENCEPIECE])
def test_tokens(kind: str, tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, kind, texts=CORPUS)
    model = examples.build("llama", vocab_size=len(own) + 3)
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: None)
    checkpoints.write(tmp_path / "model.gguf", checkpoint, tokenizer=tmp_path)
    vocabulary = llama.llama_model_get_vocab(opened(tmp_path / "model.gguf", vocabulary=True))
    for text in tokenizers.TEXTS:
        octets, room = text.encode(), (ctypes.c_int32 * 500)()
        count = llama.llama_tokenize(vocabulary, octets, len(octets), room, len(room), True, True)
        assert list(room[:count]) == own(text).input_ids, text
