"""Models of the sizes that people run, with random weights, in full precision and quantized by several libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

import fxquant
from fxquant import Recipe, Rule
from fxquant.scheme import Scheme

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-3.2-1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
"""By name; `tiny` shows that a script works."""
PROMPT = torch.arange(3, 19).view(1, -1)


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16).eval().requires_grad_(False)


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def logits(model: Any) -> Tensor:
    found: Tensor = model(PROMPT, use_cache=False).logits.float()
    return found


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def by_fxquant(model: Any, spelling: str) -> None:
    """Every linear, the head too, which is untied for it; embeddings stay as they are."""
    fxquant.quantize(model, Recipe([Rule("lm_head", spelling), Rule("*", spelling)]), progress=False)


def by_torchao(model: Any) -> None:
    """Its prototype for CPUs, which has ATen's int4 kernel; every linear, the head too."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False))


def by_bitsandbytes(model: Any) -> None:
    """Every linear, the head too."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in linears(model):
        n, k = linear.weight.shape
        new = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4")
        new.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4")
        model.set_submodule(name, new.to("cpu").eval())


def against_its_own_weights(model: Any) -> float:
    """Relative error of the logits of a model that fxquant quantized, against a copy with decoded weights."""
    full = copy.deepcopy(model)
    fxquant.dequantize(full)
    return relative_error(logits(model), logits(full))


def token_bytes(shapes: list[tuple[int, int]], way: str) -> int:
    """Bytes of the weights that a token multiplies with: linears of all these shapes, as this way stores them."""
    if way.startswith("bf16"):
        return sum(2 * n * k for n, k in shapes)
    if way == "torchao":
        return sum(n * k // 2 + 4 * n * (k // 128) for n, k in shapes)  # a scale and a zero point, bfloat16
    spelling = "nf4" if way == "bitsandbytes" else way.split()[1]
    return sum(Scheme.parse(spelling).nbytes(n, k) for n, k in shapes)
