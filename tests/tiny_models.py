"""Tiny random models of any transformers architecture: the config's defaults, shrunk by rules on attribute names."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from tiny_exceptions import EXCEPTIONS, HEAD_DIM, HEADS, LAYERS, VOCAB, WIDTH, WITH_EXPERTS
from torch import nn


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _kv_heads(value: int) -> int:
    return 1 if value == 1 else 2


# (group, attribute name, what its value becomes): the first match wins; only numbers above 1 are shrunk. A group can be
# switched off as a whole when an architecture does not build with it.
RULES: tuple[tuple[str, str, int | Callable[[int], int]], ...] = (
    ("vocab", r"(.*_)?vocab(_size)?(_.*)?", _at_most(VOCAB)),
    ("layers", r"(.*_)?num_kv_shared_layers|first_k_dense_replace|num_dense_layers", _at_most(1)),
    ("layers", r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_blocks)", LAYERS),
    ("layers", r"layers|depth|[lxr]_layers|(.*_)?num_(en|de)coder_layers|h_cycles|l_cycles", LAYERS),
    ("layers", r".*(layer_period|_interval|sliding_window_pattern|every_n_layers|layer_group_size)", _at_most(2)),
    ("layers", r".*layer_offset", _at_most(1)),
    ("layers", r"num_sparse_(en|de)coder_layers", _at_most(1)),
    ("state", r"mamba_(n|num)_heads", 8),
    ("state", r"mamba_(d_head|head_dim)", HEAD_DIM),
    ("state", r"mamba_d_ssm", 2 * WIDTH),
    ("state", r"(mamba_d_state|state_size|ssm_state_size)", HEAD_DIM),
    ("state", r"(mamba_)?n_groups", _at_most(2)),
    ("state", r"linear_(key|value)_head_dim|linear_head_dim", HEAD_DIM),
    ("state", r"linear_num_key_heads", 2),
    ("state", r"linear_num_value_heads|linear_num_heads", HEADS),
    ("experts", r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    ("experts", r"(.*_)?(num_experts_per_tok|moe_topk|moe_top_k|moe_k|experts_per_token)", _at_most(2)),
    ("experts", r"n_group|topk_group|n_shared_experts", 1),
    ("experts", r"(.*_)?zero_expert_num", 2),
    ("heads", r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads|num_global_key_value_heads)", _kv_heads),
    ("heads", r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|index_n_heads)", HEADS),
    ("heads", r"(.*_)?(qk_rope_head_dim|rotary_dim)", HEAD_DIM // 2),
    ("heads", r"(.*_)?(head_dim|qk_nope_head_dim|qk_head_dim|v_head_dim|d_kv|d_head|head_size)", HEAD_DIM),
    ("ranks", r"(.*_)?(lora_rank|lora_dim|dt_rank|_rank)", HEAD_DIM),
    ("widths", r"(.*_)?(hidden_size|d_model|n_embd|model_dim|hidden_dim|embed_dim|emb_dim|d_embed)", WIDTH),
    (
        "widths",
        r"(embedding_size|lru_width|cross_attention_hidden_size|out_hidden_size|text_hidden_size|n_embed)",
        WIDTH,
    ),
    ("widths", r"output_channels", WIDTH),
    ("widths", r"num_pos_feats", WIDTH // 2),
    ("widths", r"adapter_(in|out)_dim|adapter_input_size", WIDTH),
    ("widths", r"hidden_size_per_layer_input|projection_dim", HEAD_DIM),
    (
        "ffn",
        r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|d_inner|mlp_dim|n_inner|dff|ffn_hidden_size)",
        2 * WIDTH,
    ),
    ("positions", r"(.*_)?(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(source|target)_positions)", 128),
    (
        "positions",
        r"(sliding_window|sliding_window_size|attention_window|local_attention|attention_chunk_size)",
        _at_most(16),
    ),
    ("positions", r"(mamba_)?chunk_size|.*chunk_length", _at_most(16)),
    ("vision", r"image_size|input_size", _at_most(64)),
)
GROUPS = ("layer_types", "fill", *dict.fromkeys(group for group, _, _ in RULES))
# What is tried in turn: every rule, also for numbers that a default leaves open; no such filling in; and then without
# one group of rules after the other.
OFF_SETS = (("fill",), (), *((group, "fill") for group in GROUPS if group != "fill"))
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
LAYER_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types")


def tiny_config(
    kind: str | type,
    off: tuple[str, ...] = ("fill",),
    special: Mapping[str, Mapping[str, Any]] = MappingProxyType(EXCEPTIONS),
) -> Any:
    """The config of a model type or config class, shrunk by every rule but those of the groups in `off`.

    `special` has what takes the place of single attributes, by model type.
    """
    if isinstance(kind, str):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = CONFIG_MAPPING[kind]
    return _shrink(kind(), off, special)


def _shrink(config: Any, off: tuple[str, ...], special: Mapping[str, Mapping[str, Any]]) -> Any:
    kwargs: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        default, value = _default(field), vars(config).get(field.name)
        if hasattr(value, "model_type"):
            kwargs[field.name] = _shrink(value, off, special)
        elif default is None and "fill" not in off and "int" in str(field.type):
            kwargs |= _filled(field.name)
        elif default is not None and field.init:
            # A value of another type was derived from the others: it is derived again.
            kwargs[field.name] = _shrunk(field.name, value if type(value) is type(default) else default, off)
    if "layer_types" not in off:
        _fit_layer_types(vars(config), kwargs)
    kwargs = _equal_heads(vars(config), kwargs)
    if "depths" in kwargs:  # hierarchical: every stage has its own heads and windows
        kwargs |= {name: vars(config)[name] for name in ("embed_dim", "hidden_size", "image_size") if name in kwargs}
    _fit_tokens(kwargs)
    for name, value in special.get(config.model_type, {}).items():
        if hasattr(kwargs.get(name), "model_type"):
            vars(kwargs[name]).update(value)
        else:
            kwargs[name] = value
    return _shrink_layers(type(config)(**kwargs), kwargs, off)


def _shrink_layers(config: Any, kwargs: dict[str, Any], off: tuple[str, ...]) -> Any:
    """Shrink what single layers override too; which layers those are is known only once the config is made."""
    layers = config.to_dict().get("per_layer_config")
    if not layers:
        return config
    small = {i: _equal_heads(layer, {n: _shrunk(n, v, off) for n, v in layer.items()}) for i, layer in layers.items()}
    return type(config)(**kwargs, per_layer_config=small)


def _equal_heads(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    # As many heads for keys as for queries is what makes some attentions work; fewer is for the others.
    if "num_key_value_heads" in new and old.get("num_key_value_heads") == old.get("num_attention_heads"):
        new["num_key_value_heads"] = new.get("num_attention_heads", new["num_key_value_heads"])
    return new


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shrunk(name: str, value: Any, off: tuple[str, ...]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
        return value
    for group, pattern, small in RULES:
        if group not in off and re.fullmatch(pattern, name):
            return small(value) if callable(small) else small
    return value


def _filled(name: str) -> dict[str, int]:
    unlikely = 999
    value = _shrunk(name, unlikely, ())
    return {} if value == unlikely or name.endswith("window") else {name: value}


def _fit_layer_types(old: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """One layer of each type that the default has, in order of appearance."""
    columns = {name: old[name] for name in LAYER_TYPES if isinstance(old.get(name), list)}
    count = next((name for name in LAYER_COUNTS if name in kwargs), None)
    if not columns or count is None or len({len(column) for column in columns.values()}) != 1:
        return
    rows = list(dict.fromkeys(zip(*columns.values(), strict=True)))
    rows += rows[-1:] * (LAYERS - len(rows))
    kwargs[count] = len(rows)
    kwargs |= {name: list(column) for name, column in zip(columns, zip(*rows, strict=True), strict=True)}


def _fit_tokens(kwargs: dict[str, Any]) -> None:
    # Special tokens lie within the shrunk vocabulary, each its own, from the top.
    vocab = kwargs.get("vocab_size", VOCAB)
    free = itertools.count(vocab - 1, -1)
    for name, value in kwargs.items():
        if re.fullmatch(r".*token_(id|index)", name) and isinstance(value, int) and value >= vocab:
            kwargs[name] = next(free)


def tiny_model(
    kind: str | type, auto_class: str | type = "AutoModelForCausalLM", seed: int = 0, *, experts: bool = False
) -> nn.Module:
    """A random float32 model in eval mode, equal for equal seeds; torch's own random state is left alone.

    With `experts` an architecture that need not have experts, see `WITH_EXPERTS`, has some.

    Raises:
        Exception: what transformers raised for the config with all rules on, where no set of rules builds.
    """
    first: Exception | None = None
    special = EXCEPTIONS | WITH_EXPERTS if experts else EXCEPTIONS
    for off in OFF_SETS:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return _randomized(build(tiny_config(kind, off, special), auto_class)).eval()
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def build(config: Any, auto_class: str | type) -> nn.Module:
    """The model that an auto class (by name) or a model class makes of `config`, or of the part of it that it takes."""
    import transformers

    cls: Any = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    if hasattr(cls, "_model_mapping"):
        cls = cls._model_mapping[type(config)]
        cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):
        config = next((part for part in vars(config).values() if isinstance(part, cls.config_class)), config)
    if auto_class == "AutoModelForCausalLM" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    _in_float32(config)
    return cls._from_config(config)


def _in_float32(config: Any) -> None:
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            _in_float32(value)
    config.dtype = torch.float32


def _randomized(model: nn.Module) -> nn.Module:
    # Zero biases and unit norms would hide a rewrite that loses them; torch.empty leaves anything behind.
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.02
            parameter.copy_(torch.where(parameter.isfinite() & (parameter.abs() < 100), parameter, 0) + noise)
    return model


# Encoders, encoder-decoders, vision and audio: a model type and the auto class to build it with.
OTHER_MODELS: tuple[tuple[str, str], ...] = (
    *((kind, "AutoModel") for kind in ("albert", "bert", "big_bird", "canine", "convbert", "deberta", "deberta-v2")),
    *(
        (kind, "AutoModel")
        for kind in ("distilbert", "electra", "esm", "funnel", "layoutlm", "layoutlmv3", "mobilebert")
    ),
    *((kind, "AutoModel") for kind in ("modernbert", "mpnet", "roberta", "squeezebert", "xlnet", "longformer")),
    ("bert", "AutoModelForMaskedLM"),
    ("bloom", "AutoModelForSequenceClassification"),
    *((k, "AutoModelForSeq2SeqLM") for k in ("bart", "led", "marian", "mt5", "pegasus", "t5")),
    *((k, "AutoModelForSeq2SeqLM") for k in ("nllb-moe", "switch_transformers")),
    *((kind, "AutoModel") for kind in ("beit", "clip", "blip", "convnext", "deit", "dinov2", "mobilevit")),
    *(
        (kind, "AutoModel")
        for kind in ("patchtst", "sam", "segformer", "siglip", "swin", "timesformer", "videomae", "vivit")
    ),
    ("vit", "AutoModelForImageClassification"),
    *(
        (kind, "AutoModel")
        for kind in ("audio-spectrogram-transformer", "hubert", "seamless_m4t", "wav2vec2-bert", "wavlm")
    ),
    ("wav2vec2", "AutoModelForCTC"),
    *((kind, "AutoModelForSpeechSeq2Seq") for kind in ("speech_to_text", "whisper")),
    *((kind, "AutoModelForImageTextToText") for kind in ("gemma3", "llava", "qwen2_vl")),
)


def causal_lm_types() -> list[str]:
    """Every model type of transformers' causal LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
