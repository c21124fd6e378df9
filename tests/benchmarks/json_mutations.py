"""Ways to damage the JSON of a checkpoint: its config and whatever else tells what its tensors are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors_parts import bytes_changed

NUMBERS = (0, -1, 1, 3, 7, 2**31, 2**40, 2**62, 2**70, -(2**63), 1e308, 0.5, float("nan"), float("inf"), 10**400)
WORDS = (
    *(
        "",
        "x",
        "\0",
        "auto",
        "float",
        "int",
        "../../etc/passwd",
        "re:(a+)+$",
        "*",
        "a" * 5000,
        "float16",
        "int4",
        "gptq",
    ),
    *(
        "gptq_v2",
        "awq",
        "bitsandbytes",
        "mxfp4",
        "fp8",
        "compressed-tensors",
        "fxquant",
        "llama",
        "gpt2",
        "GPTJForCausalLM",
    ),
    *(
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "__class__",
        "pack-quantized",
        "yarn",
        "dynamic",
        "longrope",
        "sliding_attention",
    ),
)
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [None], [[]], {"": None}, {"a": {"b": []}}, *NUMBERS, *WORDS)


def _documents(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if path.name != "meta.json"]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from _places(inner, (*path, key))


def _change_json(
    folder: Path, r: random.Random, wanted: Callable[[Any], bool], change: Callable[[Any, Any, Any], object]
) -> str | None:
    """`change(owner, key, value)` at a random place of a random document whose value is wanted."""
    found = []
    for file in _documents(folder):
        data = json.loads(file.read_text())
        found += [(file, data, path, value) for path, value in _places(data) if wanted(value)]
    if not found:
        return None
    file, data, path, value = r.choice(found)
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    done = change(owner, path[-1], value)
    file.write_text(json.dumps(data))
    return f"{file.name}: {'.'.join(map(str, path))}: {str(done)[:60]}"


def _put(owner: Any, key: Any, value: Any) -> Any:
    owner[key] = value
    return value if not isinstance(value, int) or value.bit_length() < 200 else "a long number"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_value(folder: Path, r: random.Random) -> str | None:
    return _change_json(folder, r, lambda _: True, lambda o, k, _: _put(o, k, r.choice(VALUES)))


def json_number(folder: Path, r: random.Random) -> str | None:
    def near(value: Any) -> Any:
        return r.choice((*NUMBERS, value * 2, value + 1, value - 1, -value))

    return _change_json(folder, r, _is_number, lambda o, k, v: _put(o, k, near(v)))


def json_word(folder: Path, r: random.Random) -> str | None:
    return _change_json(folder, r, lambda v: isinstance(v, str), lambda o, k, _: _put(o, k, r.choice(WORDS)))


def json_dropped(folder: Path, r: random.Random) -> str | None:
    def drop(owner: Any, key: Any, _: Any) -> str:
        del owner[key]
        return "dropped"

    return _change_json(folder, r, lambda _: True, drop)


def json_container(folder: Path, r: random.Random) -> str | None:
    """Objects to lists and back; single values into either."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return r.choice((list(value), list(value.values()), [value]))
        if isinstance(value, list):
            return {str(i): one for i, one in enumerate(value)} if value else {"0": 0}
        return r.choice(([value], {"value": value}, [value] * 1000))

    return _change_json(folder, r, lambda _: True, lambda o, k, v: _put(o, k, turned(v)))


def json_nested(folder: Path, r: random.Random) -> str | None:
    file = r.choice(_documents(folder) or [folder / "config.json"])
    depth, (first, last) = r.choice((50, 900, 100_000)), r.choice((("[", "]"), ('{"a":', "}")))
    file.write_text('{"quantization_config": ' + first * depth + "0" + last * depth + "}")
    return f"{file.name}: {depth} levels of {first}"


def json_bytes(folder: Path, r: random.Random) -> str | None:
    files = _documents(folder)
    return bytes_changed(r.choice(files), r, 0, None) if files else None


def json_twice(folder: Path, r: random.Random) -> str | None:
    """A key with two values: readers differ in which they take."""
    files = _documents(folder)
    if not files:
        return None
    file = r.choice(files)
    key = r.choice(list(json.loads(file.read_text()) or {"a": 0}))
    text = file.read_text().rstrip().removesuffix("}")
    file.write_text(f"{text}, {json.dumps(key)}: {json.dumps(r.choice(WORDS))}}}")
    return f"{file.name}: {key} twice"


SIZES = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "num_local_experts", "num_experts", "moe_intermediate_size"),
)


def config_sizes(folder: Path, r: random.Random) -> str | None:
    """Sizes that no memory holds."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    data = json.loads(file.read_text())
    names = r.sample(sorted(set(SIZES) & data.keys()), r.choice((1, 1, 2)))
    data |= {name: r.choice((10**5, 10**7, 2**28, 2**31, 10**9, 2**40, 2**62, 0, -1)) for name in names}
    file.write_text(json.dumps(data))
    return ", ".join(f"{name} {data[name]}" for name in names)


def config_method(folder: Path, r: random.Random) -> str | None:
    """A quantization that the tensors do not have."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    data = json.loads(file.read_text())
    quantized = data.setdefault("quantization_config", {"bits": 4, "group_size": 64})
    methods = (
        "gptq",
        "awq",
        "bitsandbytes",
        "mxfp4",
        "fp8",
        "modelopt",
        "quark",
        "torchao",
        "hqq",
        "vptq",
        "aqlm",
        "no",
    )
    quantized["quant_method"] = r.choice((*methods, "fbgemm_fp8", "bitnet", "eetq", "quanto", "auto-round", "fxquant"))
    file.write_text(json.dumps(data))
    return f"quant_method {quantized['quant_method']}"


JSON_MUTATIONS = (
    *(json_value, json_number, json_word, json_dropped, json_container, json_nested, json_bytes, json_twice),
    *(config_sizes, config_method),
)
