"""What configs of all formats need to say: which linears are left out, and which settings are the common ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from fxquant.checkpoint_contents import Contents
from fxquant.errors import FileError

Setting = TypeVar("Setting", bound=Hashable)
WRITER = "fxquant"
"""What configs call the program that wrote them."""
HEAD = "lm_head"
"""What transformers calls the linear behind the last layer, for which formats have rules of their own."""
_DTYPES = ("bfloat16", "float16", "float32")


def require_quantized(contents: Contents, format: str) -> None:
    """Refuse contents without a single quantized matrix.

    Raises:
        FileError: there is none.
    """
    if not contents.matrices:
        raise FileError(
            f"{contents.path}: {format} holds no linear of it\n  choose another format, or write it in full precision"
        )


def left_out(contents: Contents) -> list[str]:
    """Linears in full precision, as the checkpoint calls them and as the model does: sorted.

    A matrix that no module of the model is called after may be that of a linear elsewhere, and is among them.
    """
    modules = dict(contents.model.named_modules())
    quantized = {name for matrix in contents.matrices.values() for name in (matrix.name, matrix.own)}
    own = {name for name, module in modules.items() if _is_linear(module)}
    stored = {
        name.removesuffix(".weight")
        for name, spec in contents.plain.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }
    return sorted((own | {name for name in stored if not isinstance(modules.get(name), nn.Embedding)}) - quantized)


def check_left_out(contents: Contents, entries: Iterable[str]) -> None:
    """Refuse names that transformers takes for those of quantized matrices too.

    It leaves out what such an entry is the end of, and what is below it.

    Raises:
        FileError: there is one.
    """
    ends = tuple(entries)
    for name in contents.matrices if ends else ():
        if name.endswith(ends) or name.startswith(tuple(f"{entry}." for entry in ends)):
            entry = next(entry for entry in ends if name.endswith(entry) or name.startswith(f"{entry}."))
            raise FileError(
                f"{contents.path}: {entry} is in full precision and {name} is quantized, and the format cannot tell "
                "them apart\n  quantize both, or none of them, or choose another format"
            )


def shared(options: Mapping[str, Sequence[Setting]]) -> dict[Setting, list[str]]:
    """Names by settings, as few of them as possible: that first which most names can have.

    Args:
        options: by name, the settings that mean the same for it, the most natural one first.
    """
    rest, found = dict(options), dict[Setting, list[str]]()
    while rest:
        best = Counter(setting for settings in rest.values() for setting in settings).most_common(1)[0][0]
        found[best] = [name for name, settings in rest.items() if best in settings]
        rest = {name: settings for name, settings in rest.items() if best not in settings}
    return found


def compute_dtype(contents: Contents) -> torch.dtype:
    """The dtype in which the model computes, as its config says it; bfloat16 by default."""
    said = getattr(contents.config, "dtype", None) or getattr(contents.config, "torch_dtype", None)
    name = str(said).removeprefix("torch.")
    return getattr(torch, name) if name in _DTYPES else torch.bfloat16


def _is_linear(module: nn.Module) -> bool:
    """A linear, or transformers' `Conv1D`, which is one that stands on its head."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
