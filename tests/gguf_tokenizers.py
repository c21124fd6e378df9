"""Small tokenizers of the kinds that checkpoints on the hub have, as directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = (
    "def area(x, y):\n    return x * y + 12345  # it's RE'sult\n",
    "The quick brown fox doesn't jump.\n\n\n  Twice? \t12 123 1234!?... ===",
    " leading  spaces, trailing  ",
    "naïve café — 東京タワー 😀🦙 e\u0301",
    "hello<|tool|> world <think>so</think>  done",
    "a",
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "dbrx": _LLAMA3, "gpt-4o": _GPT4O, "tekken": _TEKKEN}
BYTE_LEVEL = ("gpt-2", "starcoder", *SPLITS)
"""What llama.cpp calls the ways in which they cut text."""
SENTENCEPIECE = ("llama", "gemma")


def build(folder: Path, kind: str, *, texts: list[str], template: str | None = None) -> Any:
    """Write a tokenizer, and the config.json that such a directory has. Gives it as transformers reads it."""
    from transformers import AutoTokenizer

    tokenizer = _byte_level(kind, texts) if kind in BYTE_LEVEL else _sentencepiece(kind, texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if kind in SENTENCEPIECE:
        settings["unk_token"] = "<unk>"
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(sizes))
    return AutoTokenizer.from_pretrained(folder)


def _added(tokenizer: Any) -> Any:
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one in ("<s>", "</s>", "<|tool|>")])
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in ("<think>", "</think>")])
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", number)])
    return tokenizer


def _byte_level(kind: str, texts: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in SPLITS)]
    if kind in SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated"))
    if kind == "starcoder":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    return _added(tokenizer)


def _sentencepiece(kind: str, texts: list[str]) -> Any:
    """As transformers converts them: words begin with a mark, and what is unknown becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    marked = normalizers.Replace(" ", "▁")
    steps = normalizers.Sequence([normalizers.Prepend("▁"), marked]) if kind == "llama" else marked
    trained = Tokenizer(models.BPE())
    trained.normalizer = steps
    words = [word for text in texts for word in text.replace(" ", " \0").split("\0")]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    described = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *described["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge) for merge in described["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = steps
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if kind == "llama" else undo)
    return _added(tokenizer)
