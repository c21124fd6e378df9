"""What GGUF files of each architecture hold other than transformers' models of it: data.

After llama.cpp's converters: https://github.com/ggml-org/llama.cpp, `convert_hf_to_gguf.py` and `conversion/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fxquant.errors import FileError, nearest


@dataclass(frozen=True)
class GgufModel:
    """One architecture of llama.cpp in transformers."""

    model_type: str
    model_class: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the config calls some settings, where it is not what most configs call them; or further settings."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Settings that llama.cpp has in its code and not in the file."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Switches of the config, by the tensor of layer 0 that is there when they are on."""
    has_head_dim: bool = True
    """Whether the config can be told the size of heads."""
    rope_pairs: bool = False
    """Rows of q and k stand in pairs, one of each half of a head, where transformers has half after half."""
    grouped_qkv: bool = False
    """Rows of a fused q, k, v stand q, k, v for each key-value head in transformers, and all q, all k, all v here."""
    norms_plus_one: bool = False
    """Weights of norms have 1 added."""
    conv1d: bool = False
    """transformers has linears as `Conv1D`, transposed."""
    nvfp4: bool = False
    """llama.cpp multiplies by the second level of NVFP4's scales, `.scale`; elsewhere it reads them and goes on."""
    interleaved_experts: bool = False
    """transformers has gate and up row by row in turn, and the matrices of experts transposed."""


_ATTENTION = {"attn_q.bias": "attention_bias"}
_LLAMA_BIASES = _ATTENTION | {"ffn_up.bias": "mlp_bias"}
_SHARED_EXPERTS = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

MODELS: Mapping[str, GgufModel] = MappingProxyType(
    {
        "llama": GgufModel("llama", "LlamaForCausalLM", biases=_LLAMA_BIASES, rope_pairs=True, nvfp4=True),
        "granite": GgufModel("granite", "GraniteForCausalLM", _GRANITE, biases=_LLAMA_BIASES, rope_pairs=True),
        "qwen2": GgufModel("qwen2", "Qwen2ForCausalLM"),
        "qwen2moe": GgufModel("qwen2_moe", "Qwen2MoeForCausalLM", _SHARED_EXPERTS),
        "qwen3": GgufModel("qwen3", "Qwen3ForCausalLM", biases=_ATTENTION, nvfp4=True),
        "qwen3moe": GgufModel(
            "qwen3_moe", "Qwen3MoeForCausalLM", constants={"norm_topk_prob": True}, biases=_ATTENTION, nvfp4=True
        ),
        "gemma": GgufModel("gemma", "GemmaForCausalLM", norms_plus_one=True),
        "gemma2": GgufModel("gemma2", "Gemma2ForCausalLM", _SOFTCAPS, norms_plus_one=True),
        "gemma3": GgufModel("gemma3_text", "Gemma3ForCausalLM", _SOFTCAPS, norms_plus_one=True),
        "phi3": GgufModel("phi3", "Phi3ForCausalLM"),
        "starcoder2": GgufModel(
            "starcoder2",
            "Starcoder2ForCausalLM",
            {"attention.layer_norm_epsilon": "norm_epsilon"},
            biases={"attn_q.bias": "use_bias"},
        ),
        "gpt2": GgufModel(
            "gpt2",
            "GPT2LMHeadModel",
            {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"},
            conv1d=True,
        ),
        "falcon": GgufModel(
            "falcon",
            "FalconForCausalLM",
            {
                "attention.layer_norm_epsilon": "layer_norm_epsilon",
                "attention.head_count_kv": "num_kv_heads",
                "feed_forward_length": "ffn_hidden_size",
            },
            biases={"attn_qkv.bias": "bias"},
            has_head_dim=False,
            grouped_qkv=True,
        ),
        "gpt-oss": GgufModel(
            "gpt_oss",
            "GptOssForCausalLM",
            _LOCAL_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
            interleaved_experts=True,
        ),
    }
)
"""By the name that llama.cpp has for the architecture."""

MIXTRAL = GgufModel("mixtral", "MixtralForCausalLM", _LOCAL_EXPERTS, rope_pairs=True, nvfp4=True)
"""What files of `llama` with experts are."""


SAME: Mapping[str, str] = MappingProxyType({"mistral": "llama"})
"""Model types for which llama.cpp has no architectures of their own, and the one whose files theirs are."""


def gguf_architecture(model_type: str) -> tuple[str, GgufModel]:
    """What llama.cpp calls the architecture of a model type of transformers, and what files of it hold.

    Raises:
        FileError: it is not known how files of it are to be written.
    """
    own = SAME.get(model_type, model_type)
    found = {model.model_type: (name, model) for name, model in MODELS.items()} | {"mixtral": ("llama", MIXTRAL)}
    if own not in found:
        raise FileError(
            f"models of the type {model_type!r} are not written as GGUF{nearest(model_type, found)}\n"
            f"  there are {', '.join([*found, *SAME])}: converters change tensors of each in ways of their own"
        )
    return found[own]


def gguf_model(architecture: str, experts: bool = False) -> GgufModel:
    """What files of an architecture hold.

    Args:
        architecture: as llama.cpp calls it.
        experts: whether the file has any.

    Raises:
        FileError: it is not known how its tensors were changed.
    """
    found = MIXTRAL if architecture == "llama" and experts else MODELS.get(architecture)
    if found is None:
        raise FileError(
            f"GGUF files of the architecture {architecture!r} are not read{nearest(architecture, MODELS)}\n"
            f"  there are {', '.join(MODELS)}: converters change tensors of each in ways of their own"
        )
    return found
