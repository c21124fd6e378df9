"""What single architectures need besides the rules of tests/tiny_models.py to be built tiny."""

from __future__ import annotations

from typing import Any

WIDTH, HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 4, 16, 2, 256

_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 4, 2]}
_TOP_2 = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
# Defaults of transformers that build no model, or tie numbers that no rule on one name can see.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # read by the model, no or no usable default
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **_TOP_2},  # no default
    "deepseek_v2": _TOP_2,  # no default, read at run time only
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 2 * WIDTH},  # no default
    # Frequencies for height and width stand in front of those for time; the default fits heads of 128.
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 4]},
        "moe_intermediate_size": [2 * WIDTH, WIDTH],
    },
    "flint": {"mlp_only_layers": [0]},  # by default the first two layers, which are all there are
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},  # holds the number of layers
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},  # by default no layer is attention, and none runs
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},  # no default
    "esm": {"pad_token_id": 1},  # no default
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},  # four coordinates and two shapes make the hidden size
    # As many entries as layers.
    "muse_spark_audio": {"patch_sizes": [4, 4], "hidden_sizes": [WIDTH, WIDTH], "depths": [1, 1]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},  # of two layers, the second has experts
    # Frequencies for time, height and width are half of a head's dimensions; the default fits heads of 128.
    **{kind: {"rope_parameters": _MROPE} for kind in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 2 * WIDTH},  # no default
    "step3p5": {"sliding_window": 16, "mlp_layer_types": ["dense", "sparse"]},  # experts from the fourth layer on
    "xmod": {"default_language": "en_XX"},  # no default
    # Shared weights are tied from the second hybrid layer on.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "longcat_flash": {"head_dim": HEAD_DIM // 2},  # its rotary dimensions, called qk_rope_head_dim elsewhere
    "mamba2": {"num_heads": 2 * HEADS},  # num_heads * head_dim must be expand * hidden_size
}
# Architectures that have experts where their config asks for some, which the default does not.
WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 2 * WIDTH,
    },
    "vitpose_backbone": {"num_experts": 4, "part_features": HEAD_DIM},
}
