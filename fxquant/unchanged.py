"""A model is looked at, run on fake tensors, switched about: and left exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to `model`, undo it on leaving, also by an error.

    Undone are: attributes of every module and of every config that a module holds (set, changed or deleted; lists,
    dictionaries and sets in them too, hence parameters, buffers, submodules, hooks and training flags), and the state
    of the random generators of torch on the model's devices. Not undone are writes into the tensors themselves.
    """
    saved = [(owner, _snapshot(owner)) for owner in _owners(model)]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    indices = [device.index or 0 for device in devices if device.type == kind]
    try:
        with torch.random.fork_rng(devices=indices, device_type=kind):
            yield
    finally:
        for owner, (attributes, contents) in saved:
            vars(owner).clear()
            vars(owner).update(attributes)
            for container, content in contents:
                _refill(container, content)


def _owners(model: nn.Module) -> list[Any]:
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    queue = [value for module in model.modules() for value in vars(module).values() if _is_config(value)]
    while queue:
        config = queue.pop()
        if id(config) not in owners:
            owners[id(config)] = config
            queue += [value for value in vars(config).values() if _is_config(value)]
    return list(owners.values())


def _is_config(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__name__.endswith("Config")


def _snapshot(owner: Any) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    attributes = dict(vars(owner))
    containers = [value for value in attributes.values() if isinstance(value, (dict, list, set))]
    return attributes, [(container, container.copy()) for container in containers]


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    container.update(content)
