"""Models of transformers from a directory or a hub id: with their weights, or as a skeleton without."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxquant.errors import FileError, nearest

_LARGE = 1 << 26
"""Elements from which on a tensor of a skeleton is a weight, however it is made."""


def load_config(source: str | os.PathLike[str]) -> Any:
    """The config of a checkpoint; runs no code of it.

    Raises:
        FileError: there is no such directory, or no config that transformers knows.
    """
    import transformers

    name = os.fspath(source)
    _check_source(name)
    with as_file_error(f"cannot read the config of {name}"):
        return transformers.AutoConfig.from_pretrained(name)


def model_class(config: Any) -> type[nn.Module]:
    """The class of transformers that a config asks for by `architectures`.

    Raises:
        FileError: it names none, or one that transformers does not have.
    """
    import transformers

    names = config.architectures
    name = names[0] if isinstance(names, (list, tuple)) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise FileError(
            f"the config names the model class {name!r}, which transformers {transformers.__version__} does not have\n"
            "  models that bring their own code are loaded in Python: fxquant.quantize(model, recipe)"
        )
    return found


def load_model(source: str | os.PathLike[str], *, progress: bool = True) -> nn.Module:
    """The model with its weights, in the dtype of the checkpoint, on the CPU.

    Args:
        source: directory of a checkpoint, or hub id.
        progress: let transformers show its progress bars.

    Raises:
        FileError: transformers cannot load it, or weights are missing (it would fill them with random numbers).
    """
    name = os.fspath(source)
    kind: Any = model_class(load_config(name))
    with as_file_error(f"cannot load {name}"), contextlib.nullcontext() if progress else _no_progress_bars():
        model, info = kind.from_pretrained(name, output_loading_info=True)
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise FileError(
            f"{name} lacks {len(missing)} weights of {kind.__name__}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}\n  it may be quantized in a format that transformers skipped"
        )
    assert isinstance(model, nn.Module)
    return model


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        FileError: transformers finds none there.
    """
    import transformers

    name = os.fspath(source)
    _check_source(name)
    with as_file_error(f"cannot load the tokenizer of {name}"):
        return transformers.AutoTokenizer.from_pretrained(name)


def refuse_quantized(source: str | os.PathLike[str], config: Any) -> None:
    """Refuse a checkpoint that is quantized already.

    Raises:
        FileError: names the method.
    """
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise FileError(
            f"{os.fspath(source)} is quantized already ({method or 'unknown method'})\n"
            "  give the checkpoint in full precision; fxquant inspect shows what is in this one"
        )


def skeleton(kind: type[nn.Module], config: Any, *, buffers: bool = True) -> nn.Module:
    """A model without weights, in eval mode: parameters on the meta device.

    Args:
        kind: a class of transformers.
        config: its config.
        buffers: make the buffers that no file holds (rotary frequencies, say) with their values, so that the model
            works once its weights are loaded; False: everything on the meta device.

    Raises:
        FileError: the config describes no model that can be built.
    """
    build: Any = kind
    device = _WeightsOnMeta() if buffers else torch.device("meta")
    with as_file_error(f"the config describes no {kind.__name__} that can be built"), device:
        model = build._from_config(config)
    assert isinstance(model, nn.Module)
    return model.eval()


class _WeightsOnMeta(TorchFunctionMode):
    """Factories that modules make weights with give meta tensors; what buffers are computed with stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn):
            meta = func(*args, **{**given, "device": "meta"})
            if func is torch.empty or meta.numel() >= _LARGE:
                return meta
        return func(*args, **given)


def _check_source(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileError(f"{name} holds no config.json: it is not the directory of a transformers checkpoint")
    elif path.exists():
        raise FileError(f"{name} is a file\n  give the directory of a transformers checkpoint, or a hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name.split("/")[0]).is_dir():
        parent = path.parent
        near = nearest(path.name, (p.name for p in parent.iterdir())) if parent.is_dir() else ""
        raise FileError(f"there is no directory {name}{near}")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import transformers

    logging: Any = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def as_file_error(what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one plain paragraph."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # transformers raises anything from OSError to KeyError for a bad checkpoint
        text = " ".join(str(error).split()) or "no reason given"
        raise FileError(f"{what}: {type(error).__name__}: {text[:400]}") from error
