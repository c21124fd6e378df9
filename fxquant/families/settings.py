"""What a checkpoint says about how it was quantized, looked at before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.errors import CheckpointError, nearest

LARGEST = 1 << 20
"""No number of a setting is larger: groups, blocks, books."""
_SHOWN = 80


@dataclass(frozen=True)
class Settings:
    """An object of a JSON file. A key that is null is as good as none; of several keys for one thing, any may be there.

    Raises:
        CheckpointError: by every method: a value of another type, or out of range; names that contradict each other.
    """

    place: str
    """Where it stands, for errors."""
    values: Mapping[str, Any]

    def error(self, fact: str, remedy: str = "the checkpoint contradicts itself, or is damaged") -> CheckpointError:
        """An error about these settings, to be raised."""
        return CheckpointError(f"{self.place}: {fact}\n  {remedy}")

    def get(self, *keys: str) -> Any:
        """What stands under the keys; None where nothing does."""
        found = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        first = next(iter(found.values()), None)
        for key, value in found.items():
            if value != first:
                raise self.error(f"{next(iter(found))} is {_short(first)}, and {key} is {_short(value)}")
        return first

    def integer(self, *keys: str, default: int | None = None, low: int = 1, high: int = LARGEST) -> int:
        """A whole number from `low` to `high`. No default: it has to be there."""
        value = self.get(*keys)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"{keys[0]} is {_short(value)}; it has to be a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(f"{key} is {_short(value)}; it has to be a number from {low:g} to {high:g}")
        return float(value)

    def group_size(self, *keys: str, default: int | None = None) -> int:
        """Columns that share a scale; -1: all."""
        size = self.integer(*(keys or ("group_size",)), default=default, low=-1)
        if size == 0:
            raise self.error("group_size is 0; it has to be -1, for whole rows, or positive")
        return size

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(f"{key} is {_short(value)}; it has to be true or false")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        """A string. No default: it has to be there."""
        value = self.get(*keys)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(f"{keys[0]} is {_short(value)}; it has to be a string")
        return value

    def word(self, *keys: str, known: Iterable[str], default: str | None = None) -> str:
        """One of the known words, in any case."""
        words = tuple(known)
        value = self.text(*keys, default=default)
        if value.lower() not in (word.lower() for word in words):
            hint = nearest(value[:_SHOWN], words)
            raise self.error(f"{keys[0]} is {_short(value)}{hint}", f"what can be read: {', '.join(words)}")
        return next(word for word in words if word.lower() == value.lower())

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none."""
        value = self.get(*keys)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(f"{keys[0]} is {_short(value)}; it has to be a list of strings")
        return tuple(value)

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns of a block; None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(_is_size(size) for size in value):
            raise self.error(f"{key} is {_short(value)}; it has to be two positive numbers, or null")
        return value[0], value[1]

    def inner(self, key: str) -> Settings:
        """An object within these; empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key} is {_short(value)}; it has to be an object")
        return Settings(f"{key[:_SHOWN]} in {self.place}", value or {})

    def inners(self, key: str) -> dict[str, Settings]:
        """The objects of an object of objects, by their names; a null among them is an empty one."""
        inner = self.inner(key)
        return {name: inner.inner(name) for name in inner.values}

    def over(self, other: Settings) -> Settings:
        """These settings, and those of `other` that these do not have."""
        own = {key: value for key, value in self.values.items() if value is not None}
        return Settings(self.place, {**other.values, **own})


def configured(files: CheckpointFiles) -> Settings | None:
    """What `config.json` says about quantization; None where it says nothing.

    Old files of compressed-tensors call it `compression_config`, and nest it; models with several parts may have it in
    the config of the one that writes text.

    Raises:
        CheckpointError: it is no object.
    """
    whole = Settings("config.json", files.config)
    holders = [whole]
    if isinstance(files.config.get("text_config"), dict):
        holders.append(whole.inner("text_config"))
    for holder in holders:
        for key in ("quantization_config", "compression_config"):
            found = holder.inner(key)
            if found.values:
                return found.inner("quantization_config").over(found) if key == "compression_config" else found
    return None


def settings_of(files: CheckpointFiles, *side_files: str, same: Iterable[str] = ()) -> Settings:
    """What `config.json` says about quantization, or else the first of the other files that is there.

    Raises:
        CheckpointError: there is neither, or they contradict each other in one of the keys of `same`.
    """
    config = configured(files)
    sides = [Settings(name, side) for name in side_files if (side := files.json(name)) is not None]
    found = ([config] if config is not None else []) + sides
    if not found:
        where = ", ".join(("config.json", *side_files))
        raise CheckpointError(f"{files.path} does not say how it was quantized\n  it should in {where}")
    for further in found[1:]:
        for key in same:
            one, other = found[0].get(key), further.get(key)
            if one is not None and other is not None and one != other:
                raise found[0].error(f"{key} is {_short(one)}, and {_short(other)} in {further.place}")
    return found[0]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 256:
        return "a number of more than 70 digits"
    text = repr(value[: 2 * _SHOWN]) if isinstance(value, (str, list)) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
