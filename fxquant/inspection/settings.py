"""What a checkpoint says about itself: layout, settings, producer, what was left out. None of it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.errors import FxquantError
from fxquant.families.detect import SIDE_FILES
from fxquant.families.names import REGEX, Names, by_glob, by_part, by_regex, compiled
from fxquant.families.settings import configured
from fxquant.gguf import GgufFile
from fxquant.inspection.opening import OWN, Opened
from fxquant.model_index import FORMAT, read_index

_LONGEST, _MOST = 80, 12
"""Characters of a value, and values, that are told."""
_VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "auto-round": ("packing_format",),
        "awq": ("version",),
        "bitsandbytes": ("bnb_4bit_quant_type",),
        "compressed-tensors": ("format",),
        "gptq": ("checkpoint_format", "format"),
        "modelopt": ("quant_algo",),
    }
)
"""Settings that say which of its layouts a format has: the first that is there."""
_LEFT_OUT: Mapping[str, Callable[[Iterable[str]], Names]] = MappingProxyType(
    {
        "modules_to_not_convert": by_part,
        "llm_int8_skip_modules": by_part,
        "ignored_layers": by_part,
        "exclude": by_glob,
        "exclude_modules": by_glob,
        "ignore": by_glob,
    }
)
"""Settings that name modules which are not quantized, and how they do; `re:` is for regular expressions in all."""
_NEGATIVE = "-:"
_VERSIONS = ("version", "autoround_version")
_GGUF_KEYS = ("architecture", "name", "size_label", "quantized_by", "quantization_version", "file_type", "alignment")


@dataclass(frozen=True)
class Told:
    """What a checkpoint says about itself."""

    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    producer: str = ""
    excluded: tuple[tuple[str, Names], ...] = ()
    """Settings that name modules which are not quantized."""

    def left_out(self, module: str) -> str:
        """Why a module is not quantized, by the config; empty where it does not say."""
        for setting, names in self.excluded:
            entry = names.find(module)
            if entry is not None:
                return f"left out: {setting} has {_short(entry)}"
        return ""


def told_by(opened: Opened) -> Told:
    """What a checkpoint says about itself; nothing where that cannot be read."""
    if isinstance(opened.files, GgufFile):
        return _told_by_gguf(opened.files)
    if opened.format == OWN:
        try:
            recipe = read_index(opened.path).recipe
        except FxquantError:
            recipe = ""
        return Told(f"version {FORMAT}", {"recipe": recipe} if recipe else {}, "fxquant")
    return Told() if opened.files is None else _told_by_config(opened.files, opened.format)


def _told_by_config(files: CheckpointFiles, family: str) -> Told:
    values = _values(files)
    flat = {key: value for key, value in values.items() if isinstance(value, (str, int, float)) and key[0] != "_"}
    told = ("quant_method", "method", *_VERSIONS, *_VARIANTS.get(family, ()))
    shown = {key: _short(value) for key, value in flat.items() if key not in told}
    variant = next((str(flat[key]) for key in _VARIANTS.get(family, ()) if key in flat), "")
    if family == "bitsandbytes" and flat.get("load_in_8bit", values.get("_load_in_8bit")):
        variant = "int8"
    return Told(_short(variant), dict(list(shown.items())[:_MOST]), _producer(files, family, values), _excluded(values))


def _values(files: CheckpointFiles) -> Mapping[str, Any]:
    """The settings, from where the family is told by."""
    try:
        found = configured(files)
        if found is not None:
            return {str(key): value for key, value in found.values.items() if key}
        sides = (files.json(name) for name in SIDE_FILES)
        side: dict[str, Any] = next((one for one in sides if one is not None), {})
    except FxquantError:
        return {}
    inner = side.get("quantization")
    whole = {**side, **inner} if isinstance(inner, dict) else side
    return {str(key): value for key, value in whole.items() if key}


def _producer(files: CheckpointFiles, family: str, values: Mapping[str, Any]) -> str:
    found: list[str] = []
    meta, said = values.get("meta"), values.get("producer")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    for name in quantizer if isinstance(quantizer, list) else [quantizer]:
        if isinstance(name, str):
            found.append(name.replace(":", " "))
    if isinstance(said, dict):
        found.append(" ".join(str(said[key]) for key in ("name", "version") if key in said))
    version = next((values[key] for key in _VERSIONS if isinstance(values.get(key), str)), None)
    if version is not None and version[:1].isdigit() and not found:
        found.append(f"{'auto-round' if 'autoround_version' in values else family} {version}")
    writer = files.config.get("transformers_version")
    found += [f"written with transformers {writer}"] if isinstance(writer, str) else []
    return ", ".join(_short(one) for one in found[:4])


def _excluded(values: Mapping[str, Any]) -> tuple[tuple[str, Names], ...]:
    found: list[tuple[str, Names]] = []
    for setting, kind in _LEFT_OUT.items():
        entries = values.get(setting)
        names = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        for make, some in (
            (by_regex, [name for name in names if name.startswith(REGEX)]),
            (kind, [name for name in names if not name.startswith(REGEX)]),
        ):
            try:
                found.append((setting, make(some)))
            except FxquantError:
                continue  # whoever reads the weights says what is wrong with it
    dynamic = values.get("dynamic")
    for entry in dynamic if isinstance(dynamic, dict) else ():
        if isinstance(entry, str) and entry.startswith(_NEGATIVE):
            try:
                pattern = compiled(entry.removeprefix(_NEGATIVE))
            except FxquantError:
                continue
            found.append(("dynamic", Names(frozenset(), ((entry, pattern),))))
    return tuple(found)


def _told_by_gguf(file: GgufFile) -> Told:
    from gguf import LlamaFileType

    said = {key: file.metadata.get(f"general.{key}") for key in _GGUF_KEYS}
    shown = {
        key: _short(value) for key, value in said.items() if key != "file_type" and isinstance(value, (str, int, float))
    }
    kinds = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
    number = said["file_type"]
    variant = kinds.get(number, f"file type {number}") if isinstance(number, int) else ""
    return Told(variant, shown, str(shown.get("quantized_by", "")))


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # json has whole numbers of any length, and Python refuses to print those of more than 4300 digits
    return "a number of many digits" if isinstance(value, int) and abs(value) >= 1 << 256 else value
