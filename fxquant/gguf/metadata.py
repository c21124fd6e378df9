"""What a GGUF file says of a config of transformers: the inverse of `fxquant.gguf.configs`, by the same tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fxquant.errors import FileError
from fxquant.gguf.configs import FIELDS, is_real
from fxquant.gguf.models import gguf_architecture
from fxquant.gguf.rope import rope_settings

Kind = tuple[int, int | None]
"""The type of a value, and of the elements of a list: see `GgufHeader.kinds`."""

_KINDS: Mapping[type, int] = MappingProxyType({bool: 7, int: 4, float: 6, str: 8})
"""Types of values in files, by those of Python: whole numbers are unsigned, of 32 bits."""
_LIST, _SIGNED = 9, 5


def kind_of(value: Any) -> Kind:
    """The type that a value of Python has in a file."""
    if isinstance(value, (list, tuple)):
        return _LIST, _SIGNED if type(value[0]) is int else _KINDS[type(value[0])]
    return _KINDS[type(value)], None


def model_settings(config: Any) -> dict[str, Any]:
    """What a file says of the sizes and settings of a model, by keys with the architecture: `llama.block_count`.

    Args:
        config: of transformers, of a language model.

    Raises:
        FileError: of a model type or with a kind of rotary embeddings that is not written.
    """
    architecture, model = gguf_architecture(config.model_type)
    found: dict[str, Any] = {}
    for key, name in {**FIELDS, **model.fields}.items():
        value = getattr(config, name, None)
        if value is not None:
            found[key] = float(value) if is_real(key) else value
    found["vocab_size"] = config.vocab_size
    if model.has_head_dim and getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    found |= rope_settings(config, head_size(config))
    if config.model_type in _FURTHER:
        found |= _FURTHER[config.model_type](config)
    for key, value in found.items():
        if not isinstance(value, (str, list)) and not (value >= 0):
            raise FileError(f"the config has {value!r} for {architecture}.{key}, which has to be a number from 0 on")
    return {f"{architecture}.{key}": value for key, value in found.items()}


def head_size(config: Any) -> int:
    """Rows of q that one head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _falcon(config: Any) -> dict[str, Any]:
    # the config has a number of key-value heads even where one serves all
    shared = config.multi_query and not config.new_decoder_architecture
    heads = 1 if shared else config.num_kv_heads
    return {"attention.head_count_kv": heads, "tensor_data_layout": "jploski"}


def _gpt2(config: Any) -> dict[str, Any]:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd}


def _phi3(config: Any) -> dict[str, Any]:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    # 0 tells Phi-4, which has no window, from what llama.cpp assumes where the file does not say
    return {
        "attention.sliding_window": config.sliding_window or 0,
        "rope.scaling.original_context_length": original,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    local = [kind == "sliding_attention" for kind in config.layer_types]
    usual = [(i + 1) % 6 != 0 for i in range(len(local))]
    return {} if local == usual else {"attention.sliding_window_pattern": local}


_FURTHER: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {"falcon": _falcon, "gpt2": _gpt2, "phi3": _phi3, "gemma3_text": _gemma3}
)
"""By model type: what no table says."""
