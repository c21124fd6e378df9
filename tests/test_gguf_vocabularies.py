"""Tokenizers written into GGUF files: against what transformers makes of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_contents as checkpoints
import gguf_examples as examples
import gguf_tokenizers as tokenizers
import pytest
import torch

from fxquant.gguf import gguf_tokenizer, open_gguf, write_gguf
from fxquant.gguf.metadata import kind_of
from fxquant.gguf.pre_tokenizers import pre_tokenizer
from fxquant.gguf.vocabularies import gguf_vocabulary

gguf = pytest.importorskip("gguf")
DATA = Path(__file__).parent / "data"
CORPUS = [(DATA / name).read_text(encoding="utf-8")[:30000] for name in ("sentences.txt", "heldout.txt")]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def described(path: Path, folder: Path, vocab_size: int, architecture: str = "llama") -> dict[str, Any]:
    """Write a file that holds a tokenizer alone, in a directory of its own."""
    path.parent.mkdir(exist_ok=True)
    said = gguf_vocabulary(folder, vocab_size).metadata
    metadata = {"general.architecture": architecture, **said}
    write_gguf(path, metadata, {key: kind_of(value) for key, value in metadata.items()}, {})
    return said


@pytest.mark.parametrize("kind", [*tokenizers.BYTE_LEVEL, *tokenizers.SENTENCEPIECE])
def test_texts_become_the_same_tokens(kind: str, tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, kind, texts=CORPUS, template=TEMPLATE)
    # by the architecture transformers decides what becomes of spaces that a text begins with
    architecture = {"gemma": "gemma2", "llama": "phi3"}.get(kind, "llama")
    said = described(tmp_path / "alone" / "model.gguf", tmp_path, len(own) + 3, architecture)
    again = gguf_tokenizer(open_gguf(tmp_path / "alone" / "model.gguf"))
    for text in tokenizers.TEXTS:
        ids = own(text).input_ids
        assert again(text).input_ids == ids, text
        assert again.decode(ids) == own.decode(ids), text
    assert (again.bos_token, again.eos_token, again.chat_template) == ("<s>", "</s>", TEMPLATE)
    byte_level = kind in tokenizers.BYTE_LEVEL
    assert said["tokenizer.ggml.pre"] == (kind if byte_level else "default")
    assert said["tokenizer.ggml.model"] == ("gpt2" if byte_level else "llama")
    assert said.get("tokenizer.ggml.add_space_prefix") == (None if byte_level else kind == "llama")
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    kinds = gguf.TokenType
    assert types["<s>"] == types["<|tool|>"] == kinds.CONTROL
    assert types["<think>"] == kinds.USER_DEFINED
    assert types[f"[PAD{len(own) + 2}]"] == kinds.UNUSED
    assert types["e"] == kinds.NORMAL
    assert byte_level or (types["<unk>"], types["<0x0A>"]) == (kinds.UNKNOWN, kinds.BYTE)


def test_the_tokenizer_of_a_file_goes_before_one_beside_it(tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, "qwen2", texts=CORPUS, template=TEMPLATE)
    described(tmp_path / "model.gguf", tmp_path, len(own))
    tokenizers.build(tmp_path, "gpt-2", texts=["something else"])
    again = gguf_tokenizer(open_gguf(tmp_path / "model.gguf"))
    assert (again.bos_token, again.eos_token, again.chat_template) == ("<s>", "</s>", TEMPLATE)
    assert again(CORPUS[0]).input_ids == own(CORPUS[0]).input_ids


@pytest.mark.parametrize("kind", tokenizers.SENTENCEPIECE)
def test_scores_order_merges_as_the_merges_do(kind: str, tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, kind, texts=CORPUS)
    said = described(tmp_path / "alone" / "model.gguf", tmp_path, len(own), "llama")
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    assert len(made) > 100
    assert [scores[token] for token in made] == [float(-made.index(token)) for token in made]
    assert scores["e"] <= min(scores[token] for token in made)


def test_the_tokenizers_that_come_with_fxquant(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("code-dense", "code-moe"):
        own = AutoTokenizer.from_pretrained(DATA / name)
        described(tmp_path / "alone" / "model.gguf", DATA / name, len(own))
        again = gguf_tokenizer(open_gguf(tmp_path / "alone" / "model.gguf"))
        for text in (*tokenizers.TEXTS, *CORPUS):
            assert again(text).input_ids == own(text).input_ids
            assert again.decode(own(text).input_ids) == own.decode(own(text).input_ids)


def test_a_whole_model_with_its_tokenizer(tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, "qwen2", texts=CORPUS)
    model = examples.build("qwen2", vocab_size=len(own) + 5, bos_token_id=3, eos_token_id=[4, 5])
    with torch.no_grad():
        checkpoint = checkpoints.quantized(model, lambda *_: None)
    (tmp_path / "alone").mkdir()
    _, said = checkpoints.write(tmp_path / "alone" / "model.gguf", checkpoint, tokenizer=tmp_path)
    assert said.notes == ()
    # what the tokenizer says goes before what the config does
    assert said.metadata["tokenizer.ggml.bos_token_id"] == own.bos_token_id
    again = gguf_tokenizer(open_gguf(tmp_path / "alone" / "model.gguf"))
    assert again(CORPUS[0]).input_ids == own(CORPUS[0]).input_ids
    # and once more, out of the file
    _, copied = checkpoints.write(tmp_path / "again.gguf", checkpoint, tokenizer=tmp_path / "alone" / "model.gguf")
    assert {**copied.metadata, "general.name": ""} == {**said.metadata, "general.name": ""}
    assert copied.kinds == said.kinds


def test_a_vocabulary_that_is_copied_keeps_its_types(tmp_path: Path) -> None:
    said = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": [1, 2], "other": 3}
    kinds = {"tokenizer.ggml.model": (8, None), "tokenizer.ggml.precompiled_charsmap": (9, 0), "other": (4, None)}
    write_gguf(tmp_path / "model.gguf", said, kinds, {})
    found = gguf_vocabulary(tmp_path / "model.gguf", 5)
    assert (found.metadata.keys(), found.notes) == (said.keys() - {"other"}, ())
    assert found.kinds == {key: kinds[key] for key in found.metadata}


def test_where_there_is_none(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for folder, word in ((None, "no tokenizer"), (DATA, "no tokenizer"), (tmp_path, "WordLevel")):
        found = gguf_vocabulary(folder, 96)
        assert found.metadata == {"tokenizer.ggml.model": "none"}
        assert word in found.notes[0]


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    own = tokenizers.build(tmp_path, "gpt-2", texts=CORPUS)
    found = gguf_vocabulary(tmp_path, len(own) - 2)
    said = found.metadata
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == len(own) - 2
    assert f"has {len(own)} tokens" in found.notes[0]
    assert own.convert_ids_to_tokens(len(own) - 1) not in said["tokenizer.ggml.tokens"]


def test_named_templates(tmp_path: Path) -> None:
    tokenizers.build(tmp_path, "gpt-2", texts=CORPUS)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    said = gguf_vocabulary(tmp_path, 800).metadata
    found = {key: value for key, value in said.items() if "template" in key}
    assert found == {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "b",
    }
    assert kind_of(found["tokenizer.chat_templates"]) == (9, 8)


def test_a_way_to_cut_text_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    tokenizers.build(tmp_path, "qwen2", texts=CORPUS)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    found = gguf_vocabulary(tmp_path, 800)
    assert found.metadata["tokenizer.ggml.pre"] == "default"
    assert "llama.cpp does not know how" in found.notes[0]


def test_ways_of_cutting_text_are_those_that_transformers_knows() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    known = set()
    for name, regex in mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        steps = {"type": "Sequence", "pretokenizers": [split, bytes_alone]}
        for ignore_merges in (False, True):
            tokenizer = {"pre_tokenizer": steps, "model": {"ignore_merges": ignore_merges}}
            found = pre_tokenizer(tokenizer, lambda text: [0])
            assert found == "default" or mapping.GGUF_PRE_TOKENIZER_SPLITS[found] == regex, name
            known.add(found)
    assert known >= {"qwen2", "llama-bpe", "dbrx", "gpt-4o", "tekken"}


@pytest.mark.parametrize(
    "steps",
    [
        None,
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Whitespace"},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel", "use_regex": True}]},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "use_regex": False}]},
    ],
)
def test_other_ways(steps: Any) -> None:
    assert pre_tokenizer({"pre_tokenizer": steps, "model": {}}, lambda text: [len(text)]) == "default"


def test_a_tokenizer_that_is_known_by_what_it_makes_of_the_probe() -> None:
    # the tokens of one that cuts by nothing are the bytes of the probe
    seen = []
    pre_tokenizer({"pre_tokenizer": None, "model": {}}, lambda text: seen.append(text) or [1])  # type: ignore[func-returns-value]
    assert len(seen[0]) == 350
    assert "1314151" in seen[0]
