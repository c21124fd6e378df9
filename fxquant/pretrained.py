"""Models of transformers from a directory or a hub id: with their weights, or as a skeleton without."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.checkpoint_files import read_json
from fxquant.errors import FileError, nearest

_LARGE = 1 << 26
"""Elements from which on a tensor of a skeleton is a weight, however it is made."""
_LARGEST_BUFFER = 1 << 24
"""Elements that a tensor has at most that is computed: contexts have up to ten million positions."""
_MOST_COUNTED = 1 << 16
_COUNTED = ("layer", "label", "depth")
"""Parts of names of settings of which transformers makes lists that long while it reads a config."""
_MODULES_PER_TENSOR, _FEW_MODULES = 16, 4096
"""Tensors that a model may have for each that the files have, split or not; and those that any may have."""

_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "*.tiktoken", "spiece*", "*bpe*", "tekken.json")
"""Files that any tokenizer of transformers has one of."""
_WEIGHTS_PER_BYTE = 16
"""More than any format has: vectors of codes get down to a bit for a weight."""


def load_config(source: str | os.PathLike[str]) -> Any:
    """The config of a checkpoint; runs no code of it.

    Raises:
        FileError: there is no such directory, or no config that transformers knows.
    """
    import transformers

    name = os.fspath(source)
    _check_source(name)
    if Path(name).is_dir():
        check_numbers(read_json(Path(name) / "config.json"), name)
    with as_file_error(f"cannot read the config of {name}"):
        # without the argument, transformers asks at the terminal whether to run the code
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def check_numbers(config: Mapping[str, Any], place: str) -> None:
    """Refuse a config with numbers that no model has: NaN, and so many layers that reading it would fill the memory.

    Args:
        config: what `config.json` holds.
        place: where it is from, for errors.

    Raises:
        FileError: it has such a number.
    """
    # what the quantization says is for its reader to judge
    left = [(key, value) for key, value in config.items() if key != "quantization_config"]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, one) for one in value]
        elif value != value:
            raise FileError(f"the config of {place} has {key} NaN: it has to be a number")
        elif isinstance(value, int) and value > _MOST_COUNTED and any(word in str(key) for word in _COUNTED):
            raise FileError(f"the config of {place} has {key} {min(value, 1 << 99):.3g}: {_MOST_COUNTED} are the most")


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
    with as_file_error(f"cannot load {name}"), contextlib.nullcontext() if progress else no_progress_bars():
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
    # of nothing but the kind of the model, transformers makes an empty tokenizer
    if Path(name).is_dir() and not any(file for pattern in _TOKENIZERS for file in Path(name).glob(pattern)):
        raise FileError(f"{name} holds no tokenizer")
    with as_file_error(f"cannot load the tokenizer of {name}"):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_generation_config(folder: Path) -> Any:
    """The generation config in a directory; None where there is none.

    Raises:
        FileError: transformers cannot read it.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    with as_file_error(f"cannot read the generation config in {folder}"):
        return GenerationConfig.from_pretrained(folder)


def local_checkpoint(source: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is on this machine; one that is given by its hub id is downloaded to the hub's cache.

    Args:
        source: directory of a checkpoint, GGUF file, or hub id.

    Raises:
        FileError: there is no such thing.
    """
    name = os.fspath(source)
    if Path(name).exists():
        return Path(name)
    _check_source(name)
    from huggingface_hub import snapshot_download

    with as_file_error(f"there is no directory {name}, and no such model on the hub"):
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *_TOKENIZERS, "*.txt", "*.jinja"])
        )


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


def skeleton(kind: type[nn.Module], config: Any, *, buffers: bool = True, tensors: int | None = None) -> nn.Module:
    """A model without weights, in eval mode: parameters on the meta device.

    Args:
        kind: a class of transformers.
        config: its config.
        buffers: make the buffers that no file holds (rotary frequencies, say) with their values, so that the model
            works once its weights are loaded; False: everything on the meta device.
        tensors: how many the files hold: a model that needs far more is given up while it is built. Only with
            `buffers`.

    Raises:
        FileError: the config describes no model that can be built, or one that is too large for the files.
    """
    build: Any = kind
    most = None if tensors is None else _MODULES_PER_TENSOR * tensors + _FEW_MODULES
    device = _WeightsOnMeta(most) if buffers else torch.device("meta")
    with as_file_error(f"the config describes no {kind.__name__} that can be built"), device:
        model = build._from_config(config)
    assert isinstance(model, nn.Module)
    return model.eval()


def check_size(model: nn.Module, nbytes: int, place: str) -> None:
    """Refuse a model that the files cannot hold, before anything is done for each of its experts.

    Args:
        model: a skeleton.
        nbytes: of the tensors in the files.
        place: where they are, for errors.

    Raises:
        FileError: the model has far more weights.
    """
    # zero is no size: a stack of 2^40 empty experts would take no space
    weights = sum(math.prod(max(1, size) for size in p.shape) for p in model.parameters())
    if weights > _WEIGHTS_PER_BYTE * nbytes:
        raise FileError(
            f"{place}: the {type(model).__name__} that its config describes has {weights:.3g} weights, and the files "
            f"hold {nbytes:.3g} bytes\n  the config belongs to other files, or is damaged"
        )


class _WeightsOnMeta(TorchFunctionMode):
    """Factories that modules make weights with give meta tensors; what buffers are computed with stays real."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most, self.made = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn):
            self._count()
            meta = func(*args, **{**given, "device": "meta"})
            if func is torch.empty or meta.numel() >= _LARGE:
                return meta
        elif func in (torch.arange, torch.linspace, torch.eye):
            _check_computed(func(*args, **{**given, "device": "meta"}))
        elif _product_of_sizes(args) > _LARGEST_BUFFER:
            _check_computed(_on_meta(func, args, given))
        return func(*args, **given)

    def _count(self) -> None:
        self.made += 1
        if self.most is not None and self.made > self.most:
            raise FileError(
                f"the config describes a model of more than {self.most} tensors, and the files hold far fewer\n"
                "  it belongs to other files, or is damaged"
            )


def _product_of_sizes(args: Any) -> int:
    """What bounds the elements of any function of these tensors that broadcasts or multiplies."""
    product = 1
    for one in args:
        for tensor in one if isinstance(one, (list, tuple)) else (one,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                product *= max(1, tensor.numel())
    return product


def _on_meta(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The result without its values; None where it depends on them."""

    def moved(one: Any) -> Any:
        if isinstance(one, (list, tuple)):
            return type(one)(map(moved, one))
        return one.to("meta") if isinstance(one, Tensor) else one

    try:
        return func(*map(moved, args), **kwargs)
    except Exception:  # the function itself says what is wrong, if anything is
        return None


def _check_computed(meta: Any) -> None:
    if isinstance(meta, Tensor) and meta.numel() > _LARGEST_BUFFER:
        raise FileError(
            f"the config asks for a table of {meta.numel()} numbers to be computed: no model has one that large\n"
            "  its sizes contradict each other, or are damaged"
        )


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
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from showing bars of its own."""
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
        # torch puts its own stack behind what it says
        text = " ".join(str(error).partition("\nException raised from")[0].split()) or "no reason given"
        raise FileError(f"{what}: {type(error).__name__}: {text[:400]}") from error
