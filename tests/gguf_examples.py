"""Tiny models written as GGUF files: names and changes of tensors spelled out, as llama.cpp's converters make them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_FALCON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", SIZES | {"head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama with biases": ("llama", "llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", "llama", SIZES | {"tie_word_embeddings": True}),
    "mixtral": ("llama", "mixtral", SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "granite": ("granite", "granite", SIZES | {"attention_multiplier": 0.1, "embedding_multiplier": 3.0}),
    "qwen2": ("qwen2", "qwen2", SIZES),
    "qwen2moe": ("qwen2moe", "qwen2_moe", SIZES | _MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", "qwen3", SIZES | {"head_dim": 32}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", SIZES | _MOE | {"head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("gemma", "gemma", SIZES | {"head_dim": 32}),
    "gemma2": ("gemma2", "gemma2", SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": ("gemma3", "gemma3_text", SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "phi3": ("phi3", "phi3", SIZES),
    "starcoder2": ("starcoder2", "starcoder2", SIZES),
    "gpt2": ("gpt2", "gpt2", _GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "falcon": ("falcon", "falcon", _FALCON | {"multi_query": True, "num_kv_heads": 1}),
    "falcon, new": ("falcon", "falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        SIZES | {"head_dim": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
}
"""Name, then what llama.cpp calls the architecture, what transformers calls it, and settings."""

_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_NAMES = {
    r"model\.embed_tokens|transformer\.(wte|word_embeddings)": "token_embd",
    r"transformer\.wpe": "position_embd",
    r"model\.norm|transformer\.ln_f": "output_norm",
    r"lm_head": "output",
    r"input_layernorm|ln_1|ln_mlp": "attn_norm",
    r"ln_attn": "attn_norm_2",
    r"post_attention_layernorm|ln_2": "ffn_norm",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.([qk])_norm": r"attn_\1_norm",
    r"self_attn\.sinks": "attn_sinks",
    r"self_attn\.o_proj|self_attention\.dense|attn\.c_proj": "attn_output",
    r"self_attn\.qkv_proj|attn\.c_attn|self_attention\.query_key_value": "attn_qkv",
    r"mlp\.(gate|router)": "ffn_gate_inp",
    r"mlp\.shared_expert_gate": "ffn_gate_inp_shexp",
    r"mlp\.shared_expert\.(gate|up|down)_proj": r"ffn_\1_shexp",
    r"mlp\.experts\.(gate|up|down)_proj": r"ffn_\1_exps",
    r"mlp\.gate_up_proj|mlp\.c_fc|mlp\.dense_h_to_4h": "ffn_up",
    r"mlp\.c_proj|mlp\.dense_4h_to_h": "ffn_down",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
}


def build(name: str, **settings: Any) -> Any:
    """A random model of transformers, in float32, with some settings of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, model_type, sizes = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**sizes, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            one = key.endswith("weight") and "norm" in key and not name.startswith("gemma")
            parameter.copy_(torch.randn_like(parameter) * 0.1 + float(one))
    return model


def gguf_name(name: str, architecture: str) -> str:
    """What llama.cpp calls a parameter."""
    base, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias|_bias)?", name).groups()  # type: ignore[union-attr]
    layer = re.match(r"(?:model\.layers|transformer\.h)\.(\d+)\.", base)
    local = base[layer.end() :] if layer else base
    prefix = f"blk.{layer[1]}." if layer else ""
    end = ".bias" if suffix and suffix.endswith("bias") else ".weight"
    if architecture in ("gemma2", "gemma3") and local in _GEMMA_NORMS:
        return f"{prefix}{_GEMMA_NORMS[local]}{end}"
    if architecture == "gpt-oss" and local == "post_attention_layernorm":
        return f"{prefix}post_attention_norm{end}"
    for pattern, new in _NAMES.items():
        if found := re.fullmatch(pattern, local):
            return prefix + found.expand(new) + end
    raise AssertionError(name)


def paired(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's `permute`: https://github.com/ggml-org/llama.cpp, conversion/llama.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def regrouped(weight: Tensor, heads: int, groups: int) -> Tensor:
    """Falcon's fused q, k, v: conversion/falcon.py."""
    dim = weight.shape[0] // (heads + 2 * groups)
    qkv = weight.view(groups, heads // groups + 2, dim, -1)
    return torch.cat([part.reshape(-1, weight.shape[1]) for part in (qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])])


def gguf_tensors(model: Any, architecture: str) -> dict[str, Tensor]:
    """The tensors of a model as llama.cpp's converter has them, float32."""
    config, found = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = {name: value}
        if "experts.gate_up_proj" in name or (architecture == "gpt-oss" and "experts.down_proj" in name):
            parts = _expert_parts(name, value, architecture == "gpt-oss")
        for part, tensor in parts.items():
            key = gguf_name(part, architecture)
            found[key] = _changed(part, tensor, config, architecture).contiguous()
    return found


def _expert_parts(name: str, value: Tensor, interleaved: bool) -> dict[str, Tensor]:
    if interleaved and not name.endswith("_bias"):
        value = value.transpose(1, 2)
    if "gate_up_proj" not in name:
        return {name: value}
    halves = (value[:, ::2], value[:, 1::2]) if interleaved else value.chunk(2, 1)
    return {name.replace("gate_up", part): half for part, half in zip(("gate", "up"), halves, strict=True)}


def _changed(name: str, value: Tensor, config: Any, architecture: str) -> Tensor:
    if architecture in ("llama", "granite") and re.search(r"[qk]_proj\.", name):
        return paired(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
    if architecture == "falcon" and "query_key_value" in name:
        return regrouped(value, config.num_attention_heads, config.num_kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
        return value.T
    return value[0] if name.endswith("shared_expert_gate.weight") else value


def metadata(writer: Any, config: Any, architecture: str) -> None:
    """What converters write about a model."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", 4 * config.hidden_size)
    )
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", heads))
    for field, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("norm_epsilon", writer.add_layer_norm_eps),
        ("layer_norm_epsilon", writer.add_layer_norm_eps),
        ("num_local_experts", writer.add_expert_count),
        ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("sliding_window", writer.add_sliding_window),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if getattr(config, field, None) is not None:
            add(getattr(config, field))
    if getattr(config, "head_dim", None) and architecture != "falcon":
        writer.add_key_length(config.head_dim)
    if architecture == "gpt-oss":
        import gguf

        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    rope = config.rope_parameters if getattr(config, "rope_parameters", None) else {}
    rope = rope.get("full_attention", rope)
    if architecture not in ("falcon", "gpt2") and "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])


def quantizes(name: str, tensor: Tensor) -> bool:
    """Whether llama.cpp quantizes such a tensor."""
    return name.endswith(".weight") and tensor.ndim > 1 and "ffn_gate_inp" not in name


def write(path: Path, name: str, model: nn.Module, type_name: str = "F32", **options: Any) -> dict[str, Tensor]:
    """Write a model as a GGUF file; matrices in some type of gguf. Gives the tensors before they are quantized."""
    import gguf

    architecture = MODELS[name][0]
    writer = gguf.GGUFWriter(path, architecture, **options)
    metadata(writer, model.config, architecture)
    tensors = gguf_tensors(model, architecture)
    kind = gguf.GGMLQuantizationType[type_name]
    for key, value in tensors.items():
        data = value.numpy()
        if type_name == "F32" or not quantizes(key, value):
            writer.add_tensor(key, data.astype(np.float32))
        else:
            writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
