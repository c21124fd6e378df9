"""The tokenizer of a checkpoint as metadata of a GGUF file: the inverse of `fxquant.gguf.tokenizers`.

After llama.cpp's converters: https://github.com/ggml-org/llama.cpp, `conversion/base.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxquant.gguf.files import open_gguf
from fxquant.gguf.metadata import Kind
from fxquant.gguf.pre_tokenizers import DEFAULT, pre_tokenizer
from fxquant.pretrained import as_file_error, load_tokenizer

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any one of which makes a tokenizer."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp numbers them."""
_SPACE = "▁"
_KEY = "tokenizer.ggml."
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer."""

    metadata: dict[str, Any]
    kinds: dict[str, Kind] = field(default_factory=dict)
    """The types of values that are not what `kind_of` tells."""
    notes: tuple[str, ...] = ()
    """What it does not say, in words."""


def gguf_vocabulary(path: Path | None, vocab_size: int) -> Vocabulary:
    """What a file says of a tokenizer.

    Args:
        path: the directory of a checkpoint, or a GGUF file, whose own is taken over; None: there is no tokenizer.
        vocab_size: rows of the embeddings: the file has as many tokens, unused ones if need be.

    Returns:
        Where there is no tokenizer, or of a kind that llama.cpp does not have for language models, that there is none.

    Raises:
        FileError: the tokenizer cannot be read.
    """
    if path is not None and path.is_file():
        file = open_gguf(path)
        found = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        return Vocabulary(found, {key: file.kinds[key] for key in found})
    if path is None or not any((path / name).is_file() for name in _FILES):
        return _none("there is no tokenizer, and none is in the file")
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _none(f"the {type(tokenizer).__name__} of {path} has no tokenizer.json: the file has no tokenizer")
    with as_file_error(f"cannot describe the tokenizer of {path}"):
        return _described(path, tokenizer, json.loads(backend.to_str()), vocab_size)


def _none(note: str) -> Vocabulary:
    return Vocabulary({_KEY + "model": "none"}, notes=(note,))


def _described(path: Path, tokenizer: Any, described: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    model = described["model"]
    steps = json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    if model["type"] != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in steps):
        return _none(f"the tokenizer of {path} is {model['type']}, which llama.cpp does not have: none is in the file")
    byte_level = not model.get("byte_fallback")
    notes: list[str] = []
    tokens, types = _tokens(tokenizer, vocab_size, byte_level=byte_level)
    found: dict[str, Any] = {_KEY + "model": "gpt2" if byte_level else "llama", _KEY + "pre": DEFAULT}
    if byte_level:
        found[_KEY + "pre"] = pre_tokenizer(described, tokenizer.encode)
        if found[_KEY + "pre"] == DEFAULT:
            notes.append(f"llama.cpp does not know how the tokenizer of {path} cuts text, and may cut it in other ways")
    else:
        first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
        found[_KEY + "add_space_prefix"] = first.startswith(_SPACE)
        found[_KEY + "scores"] = _scores(tokens, types, model["merges"])
    if len(tokenizer) > vocab_size:
        notes.append(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model {vocab_size}: none of the rest"
        )
    found |= {_KEY + "tokens": tokens, _KEY + "token_type": types}
    # a space parts the two halves of a merge
    spaced = any(" " in part for merge in model["merges"] if not isinstance(merge, str) for part in merge)
    found |= _special(path, vocab_size, merges=bool(model["merges"]) and (byte_level or not spaced))
    return Vocabulary(found | _added(tokenizer, vocab_size), notes=tuple(notes))


def _tokens(tokenizer: Any, vocab_size: int, *, byte_level: bool) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        if i < vocab_size:
            tokens[i], types[i] = token, _NORMAL
            if not byte_level and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                types[i] = _BYTE
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < vocab_size:
            types[i] = _CONTROL if token.special else _USER_DEFINED
            # llama.cpp looks for these in the text itself
            tokens[i] = token.content if token.special else token.content.replace(_SPACE, " ")
    if not byte_level and tokenizer.unk_token_id is not None and tokenizer.unk_token_id < vocab_size:
        types[tokenizer.unk_token_id] = _UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """What sentencepiece orders merges by: the later a token is first made, the lower."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    fixed = {_BYTE: 0.0, _CONTROL: 0.0, _UNKNOWN: 0.0, _USER_DEFINED: -1000.0}
    lowest = len(merges)
    return [
        fixed[kind] if kind in fixed else float(-ranks.get(token, lowest))
        for token, kind in zip(tokens, types, strict=True)
    ]


def _special(path: Path, vocab_size: int, *, merges: bool) -> dict[str, Any]:
    """Merges, numbers of special tokens and chat templates, as gguf finds them in the files."""
    import gguf

    writer = gguf.GGUFWriter(None, "")
    gguf.SpecialVocab(path, load_merges=merges, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    return {key: one.value for key, one in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def _added(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """What it puts before and behind a text; and the special tokens that no file names."""
    import gguf

    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    found: dict[str, Any] = {
        _KEY + "add_bos_token": whole[:1] == [tokenizer.bos_token_id] and whole[: len(bare)] != bare,
        _KEY + "add_eos_token": whole[-1:] == [tokenizer.eos_token_id] and whole[-len(bare) :] != bare,
    }
    writer = gguf.GGUFWriter(None, "")
    for kind in _SPECIAL:
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None and number < vocab_size:
            getattr(writer, f"add_{kind}_token_id")(number)
    return found | {key: one.value for key, one in writer.kv_data[0].items() if key.startswith("tokenizer.")}
