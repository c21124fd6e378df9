"""What llama.cpp calls the way in which a byte-level tokenizer cuts text before it merges bytes.

Files hold the name alone, `tokenizer.ggml.pre`; the regular expressions are in llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

DEFAULT = "default"
"""A way of its own, which fits no tokenizer in particular."""

_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
_KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
        "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
        "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
        "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",
        "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
        "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
        "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
        "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
        "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
        "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
        "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
        "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
        "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
        "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
        "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
        "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
        "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
        "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
        "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
        "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
        "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
        "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
        "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
        "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
        "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    }
)
"""Of tokenizers of the architectures that are written: by the SHA-256 of what they make of the probe.

https://github.com/ggml-org/llama.cpp/pull/6920, and the table in `conversion/base.py`.
"""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_EXPRESSIONS: Mapping[str, str] = MappingProxyType(
    {
        rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACES}": "qwen2",
        rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}": "dbrx",
        rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n/]*|{_SPACES}": "gpt-4o",
        rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}|{_PUNCTUATION}[\r\n/]*|{_SPACES}": "tekken",
    }
)
"""What a tokenizer may split by before it goes over to bytes, as tokenizer.json has it."""
_WHOLE_WORDS: Mapping[str, str] = MappingProxyType({"dbrx": "llama-bpe"})
"""The same way, for a tokenizer that takes words which are tokens as they are, without merging."""


def pre_tokenizer(described: Mapping[str, Any], encode: Callable[[str], list[int]]) -> str:
    """The name of a tokenizer's way: of one that is known, or else of one that cuts text in the same way.

    Args:
        described: the tokenizer.json.
        encode: the tokens of a text, with those that are put before and behind it.

    Returns:
        `default` where llama.cpp has no such way.
    """
    digest = hashlib.sha256(str(encode(_PROBE)).encode()).hexdigest()
    if digest in _KNOWN:
        return _KNOWN[digest]
    found = _by_steps(_steps(described.get("pre_tokenizer")))
    if described["model"].get("ignore_merges"):
        return _WHOLE_WORDS.get(found, found)
    return found


def _steps(described: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if described is None:
        return []
    if described.get("type") == "Sequence":
        return [step for one in described["pretokenizers"] for step in _steps(one)]
    return [described]


def _by_steps(steps: list[Mapping[str, Any]]) -> str:
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return DEFAULT
    *first, last = steps
    if last.get("use_regex", True):
        digits = json.dumps([{"type": "Digits", "individual_digits": True}])
        return {"[]": "gpt-2", digits: "starcoder"}.get(json.dumps(first), DEFAULT)
    split = first[0] if len(first) == 1 else {}
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return DEFAULT
    return _EXPRESSIONS.get(split["pattern"].get("Regex", ""), DEFAULT)
