"""All that a GGUF file says before its tensors: of the model, its tokenizer, and itself."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import FileError
from fxquant.gguf.configs import TOKENS, config_without_file
from fxquant.gguf.files import FLOAT_TYPES, GgufFile
from fxquant.gguf.header import GgufTensor
from fxquant.gguf.metadata import Kind, kind_of, model_settings
from fxquant.gguf.models import gguf_architecture
from fxquant.gguf.rope import is_same_rotation, rope_notes
from fxquant.gguf.vocabularies import gguf_vocabulary
from fxquant.gguf.writing import GgufSpec
from fxquant.pretrained import as_file_error

_WITH_WINDOWS = ("gemma2", "gemma3_text", "gpt_oss")
"""Model types of which llama.cpp knows that attention may be limited to a window."""
_WITHOUT_EFFECT = re.compile(
    r"model_type|architectures|dtype|transformers_version|_name_or_path|.*_token_id|use_cache|initializer.*|.*dropout.*"
    r"|.*pdrop|output_.*|return_dict|id2label|label2id|problem_type|is_encoder_decoder|chunk_size_feed_forward"
    r"|pretraining_tp|summary_.*|router_aux_loss_coef|router_jitter_noise|input_jitter_noise|cache_implementation"
    r"|tie_word_embeddings|decoder_sparse_step|mlp_only_layers|use_sliding_window|max_window_layers"
    r"|reorder_and_upcast_attn|num_ln_in_parallel_attn|multi_query|num_kv_heads|quantization_config"
)
"""Settings of configs that change nothing of what a model computes, or that its tensors tell."""
_GELU = frozenset({"gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate"})
"""One function, and approximations of it: llama.cpp has the same one for all models."""
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class GgufDescription:
    """What stands before the table of tensors."""

    metadata: Mapping[str, Any]
    """As `GgufFile.metadata` has them."""
    kinds: Mapping[str, Kind]
    """The types of their values."""
    notes: tuple[str, ...]
    """What a reader of the file will not know of the model or its tokenizer: sentences for people."""


def gguf_metadata(config: Any, tokenizer: Path | None, tensors: Mapping[str, GgufSpec], name: str) -> GgufDescription:
    """What a file says of a model of transformers.

    Args:
        config: of the model.
        tokenizer: the directory of a checkpoint, or the GGUF file, that has the tokenizer; None: there is none.
        tensors: of the file.
        name: of the model, for people.

    Raises:
        FileError: the model is of a type that is not written, has settings that GGUF has no place for and that its
            readers have otherwise, or the tokenizer cannot be read.
    """
    architecture, _ = gguf_architecture(config.model_type)
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _file_type(tensors),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **model_settings(config),
    }
    _require_told(config, metadata, tensors)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    notes = vocabulary.notes + rope_notes(config)
    window = getattr(config, "sliding_window", None)
    if window and config.model_type not in _WITH_WINDOWS:
        notes += (f"llama.cpp has no attention within a window of {window} for {architecture}: it attends to all",)
    metadata |= vocabulary.metadata
    for kind, own in TOKENS.items():
        number = getattr(config, own, None)
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            metadata.setdefault(f"tokenizer.ggml.{kind}_token_id", number)
    kinds = {key: kind_of(value) for key, value in metadata.items() if key not in vocabulary.kinds}
    return GgufDescription(metadata, kinds | vocabulary.kinds, notes)


def _file_type(tensors: Mapping[str, GgufSpec]) -> int:
    """llama.cpp's number for files most of whose weights are of the type that most of these are."""
    from gguf import LlamaFileType

    weights: Counter[str] = Counter()
    for spec in tensors.values():
        weights[spec.type_name] += math.prod(spec.shape)
    blocks = Counter({name: count for name, count in weights.items() if name not in FLOAT_TYPES})
    most = (blocks or weights or Counter({"F32": 1})).most_common(1)[0][0]
    names = ("ALL_F32",) if most == "F32" else (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_MOE")
    return int(
        next((LlamaFileType[name] for name in names if name in LlamaFileType.__members__), LlamaFileType.GUESSED)
    )


def _require_told(config: Any, metadata: Mapping[str, Any], tensors: Mapping[str, GgufSpec]) -> None:
    """Refuse a config that would be another one when the file is read.

    Raises:
        FileError: names the settings.
    """
    import transformers

    here = Path(f"{metadata['general.name']}.gguf")
    # factors of rotary embeddings are tensors, which are not there yet
    headers = {
        tensor: GgufTensor(here, spec.type_name, spec.shape, 0, 0)
        for tensor, spec in tensors.items()
        if not tensor.startswith("rope_")
    }
    factors = len(headers) < len(tensors)
    told = {key: value for key, value in metadata.items() if not (factors and key.endswith(".rope.scaling.type"))}
    described = config_without_file(GgufFile(here, _as_stored(told), {}, headers))
    with as_file_error("the metadata describe no model"):
        again = transformers.AutoConfig.for_model(**described).to_dict()
    own = config.to_dict()
    lost = [
        f"{key} is {own[key]!r}, and readers take it for {again[key]!r}"
        for key in sorted(own.keys() & again.keys())
        if not _WITHOUT_EFFECT.fullmatch(key) and not (factors and key == "rope_parameters")
        if not (is_same_rotation if key == "rope_parameters" else _agree)(own[key], again[key])
    ]
    if lost:
        raise FileError(
            f"a GGUF file of {metadata['general.architecture']} has no place for settings of the config\n  "
            + "\n  ".join(lost)
        )


def _as_stored(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value
        for key, value in metadata.items()
    }


def _agree(own: Any, again: Any) -> bool:
    """Whether a setting says nothing, or the same, as far as float32 goes."""
    if own is None:
        return True
    if isinstance(own, str) and own in _GELU:
        return again in _GELU
    if isinstance(own, float) and isinstance(again, (int, float)):
        return math.isclose(own, again, rel_tol=1e-6, abs_tol=1e-12)
    return bool(own == again)
