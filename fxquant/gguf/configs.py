"""The config of a transformers model from what a GGUF file says about it.

transformers has a reader of its own, which takes ten seconds for a vocabulary and leaves out what its models need:
`attention.key_length` of qwen3, sizes of experts, scaling of rotary embeddings, soft caps; it takes mixtures for llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fxquant.checkpoint_files import read_json
from fxquant.errors import FileError
from fxquant.gguf.files import GgufFile
from fxquant.gguf.models import SAME, GgufModel, gguf_model
from fxquant.gguf.names import has_experts
from fxquant.gguf.rope import rope_base, rope_parameters

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
)
"""What configs call settings, by what files do. Architectures may have further ones, see `GgufModel.fields`."""
_REALS = ("_epsilon", "scale", "_softcapping")
"""Ends of keys of settings that are no whole numbers."""
_DTYPES: Mapping[str, str] = MappingProxyType({"BF16": "bfloat16", "F16": "float16"})
TOKENS: Mapping[str, str] = MappingProxyType({"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"})
"""Special tokens that configs name, by what files call them."""
_DIMENSIONS = ("embedding_length", "attention.head_count", "attention.head_count_kv", "expert_count")
"""Settings that no tensor can be smaller than: the largest dimension in the file bounds them."""


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """What `config.json` would say: for `AutoConfig.for_model(**config)`.

    Where a config.json lies beside the file, that is it, but for the size of the vocabulary and the tie of the output
    to the embeddings, which are as in the file: converters cut off tokens that are not there.

    Args:
        file: of an architecture in `fxquant.gguf.models.MODELS`.

    Raises:
        FileError: of another one; or the metadata lack something, or cannot be true of the tensors; or the config.json
            is that of another model.
    """
    model = gguf_model(file.architecture, has_experts(file.headers))
    _check(file)
    return (_beside(file, model) or _from_metadata(file, model)) | _as_stored(file)


def config_without_file(file: GgufFile) -> dict[str, Any]:
    """`gguf_config` of a file that is not there yet, and whose metadata alone are asked."""
    model = gguf_model(file.architecture, has_experts(file.headers))
    _check(file)
    return _from_metadata(file, model) | _as_stored(file)


def _as_stored(file: GgufFile) -> dict[str, Any]:
    return {"vocab_size": _vocabulary(file), "tie_word_embeddings": "output.weight" not in file.headers}


def _from_metadata(file: GgufFile, model: GgufModel) -> dict[str, Any]:
    experts = has_experts(file.headers)
    config: dict[str, Any] = {"model_type": model.model_type, "architectures": [model.model_class]}
    for key, name in {**FIELDS, **model.fields}.items():
        found = _uniform(file, key)
        if found is None or (key.startswith("expert_") and not experts):
            continue
        if type(found) is not (float if is_real(key) else int):
            raise FileError(f"{file.path}: {file.architecture}.{key} is {found!r}, a {type(found).__name__}")
        config[name] = found
    config |= {name: f"blk.0.{tensor}" in file.headers for tensor, name in model.biases.items()}
    # None, too: the defaults of config classes are tokens of some other model
    config |= {name: _token(file, f"tokenizer.ggml.{kind}_token_id") for kind, name in TOKENS.items()}
    if model.has_head_dim:
        config["head_dim"] = head_dim(file)
    if parameters := rope_parameters(file, head_dim(file)):
        config["rope_parameters"] = parameters
    dtype = next((_DTYPES[h.type_name] for h in file.headers.values() if h.type_name in _DTYPES), None)
    if dtype is not None:
        config["dtype"] = dtype
    if model.model_type in _FURTHER:
        config |= _FURTHER[model.model_type](file, {"head_dim": head_dim(file), **config})
    return {**config, **model.constants}


def is_real(key: str) -> bool:
    """Whether a setting is no whole number."""
    return key.endswith(_REALS)


def _beside(file: GgufFile, model: GgufModel) -> dict[str, Any] | None:
    path = file.path.parent / "config.json"
    if not path.is_file():
        return None
    config = {name: value for name, value in read_json(path).items() if name != "quantization_config"}
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") == model.model_type:
        # the file has the language model alone
        config = text | {"architectures": [model.model_class]}
    known = [model.model_type, *(one for one, own in SAME.items() if own == model.model_type)]
    if config.get("model_type") not in known:  # no set: what is looked up may be a list
        raise FileError(
            f"{path} is that of a {config.get('model_type')!r} model, and {file.path.name} beside it holds a "
            f"{model.model_type!r} one\n  put them into directories of their own"
        )
    return {"architectures": [model.model_class], **config}


def head_dim(file: GgufFile) -> int:
    """Rows of q that one head has.

    Raises:
        FileError: the file does not say.
    """
    if file.value("attention.key_length") is not None:
        return size(file, "attention.key_length")
    return size(file, "embedding_length") // size(file, "attention.head_count")


def size(file: GgufFile, key: str) -> int:
    """A positive whole number of the metadata.

    Raises:
        FileError: there is none.
    """
    found = _uniform(file, key)
    if type(found) is not int or found < 1:
        raise FileError(f"{file.path}: {file.architecture}.{key} is {found!r}; it has to be a positive number")
    return found


def _uniform(file: GgufFile, key: str) -> Any:
    """A number of the metadata; one that is given for each layer has to be the same for all of them."""
    found = file.value(key)
    if isinstance(found, list) and found:
        if any(one != found[0] for one in found):
            raise FileError(f"{file.path}: {file.architecture}.{key} differs between layers: {found[:8]}")
        found = found[0]
    if found is not None and not isinstance(found, (bool, int, float)):
        raise FileError(f"{file.path}: {file.architecture}.{key} is {found!r}; it has to be a number")
    return found


def _check(file: GgufFile) -> None:
    """Refuse sizes that the tensors cannot have, before a model of these sizes is built."""
    largest = max((max(header.shape) for header in file.headers.values()), default=0)
    for key in _DIMENSIONS:
        found = _uniform(file, key)
        if found is not None and found > largest:
            raise FileError(f"{file.path}: {file.architecture}.{key} is {found}, more than any tensor has: {largest}")
    if size(file, "block_count") > len(file.headers) or head_dim(file) > largest:
        raise FileError(
            f"{file.path} is to have {size(file, 'block_count')} layers with heads of {head_dim(file)}, "
            f"and has {len(file.headers)} tensors, none larger than {largest}"
        )


def _token(file: GgufFile, key: str) -> int | None:
    found = file.metadata.get(key)
    if found is not None and (type(found) is not int or not 0 <= found < _vocabulary(file)):
        raise FileError(f"{file.path}: {key} is {found!r}, which is no token of {_vocabulary(file)}")
    return found


def _vocabulary(file: GgufFile) -> int:
    header = file.headers.get("token_embd.weight")
    if header is None:
        raise FileError(f"{file.path} holds no token_embd.weight: it is not the model, or only a part of it")
    return header.shape[0]


def _dimension(file: GgufFile, kind: str, which: int) -> int:
    """N (-2) or K (-1) of the first matrix of this kind."""
    end = f".{kind}.weight"
    found = next((h.shape for name, h in file.headers.items() if name.endswith(end) and len(h.shape) > 1), None)
    if found is None:
        raise FileError(f"{file.path}, of {file.architecture}, holds no matrix {kind}")
    return found[which]


def _mixture(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    # the sizes are missing in older files
    found: dict[str, Any] = {"moe_intermediate_size": _dimension(file, "ffn_down_exps", -1)}
    layers = range(config["num_hidden_layers"])
    found["mlp_only_layers"] = [i for i in layers if f"blk.{i}.ffn_gate.weight" in file.headers]
    if config["model_type"] == "qwen2_moe":
        found["shared_expert_intermediate_size"] = _dimension(file, "ffn_up_shexp", -2)
    return found


def _gemma2(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    # the largest of each series scales attention by the width of the model: 46 layers of gemma 2, 62 of gemma 3
    wide = config["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    per_head: int = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": per_head if wide else config["head_dim"]}


def _gemma3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    pattern = file.value("attention.sliding_window_pattern")
    if not config.get("sliding_window"):
        local = [False for _ in layers]
    elif isinstance(pattern, list) and len(pattern) == len(layers):
        local = [bool(one) for one in pattern]
    else:
        every = pattern if type(pattern) is int and pattern > 0 else 6
        local = [(i + 1) % every != 0 for i in layers]
    swa = rope_base(file, "rope.freq_base_swa") or 10000.0
    rope = {
        "full_attention": {"rope_theta": 1e6, **config.get("rope_parameters", {"rope_type": "default"})},
        "sliding_attention": {"rope_type": "default", "rope_theta": swa},
    }
    kinds = ["sliding_attention" if one else "full_attention" for one in local]
    return _gemma2(file, config) | {"layer_types": kinds, "rope_parameters": rope}


def _phi3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters", {})
    original = rope.get("original_max_position_embeddings", file.value("rope.scaling.original_context_length"))
    found = {} if original is None else {"original_max_position_embeddings": original}
    return found | {"sliding_window": config.get("sliding_window") or None}


def _falcon(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    new = "blk.0.attn_norm_2.weight" in file.headers
    return {"new_decoder_architecture": new, "multi_query": config.get("num_kv_heads", 1) == 1, "alibi": False}


def _gpt_oss(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = {**config.get("rope_parameters", {})}
    if rope.get("rope_type") == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, **rope}
    return {"rope_parameters": rope}


_FURTHER: Mapping[str, Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]]] = MappingProxyType(
    {
        "qwen2_moe": _mixture,
        "qwen3_moe": _mixture,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "phi3": _phi3,
        "falcon": _falcon,
        "gpt_oss": _gpt_oss,
    }
)
"""By model type: what else there is to say, given what has been said."""
