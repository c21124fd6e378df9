"""Quantized models as files: a directory with plain tensors in safetensors and everything else in JSON.

    config.json            transformers' config, with `quantization_config: {"quant_method": "fxquant"}`
    fxquant.json           format version, model class, schemes and dtypes of all that is quantized, shared tensors
    fxquant.safetensors    the state_dict: planes, biases and all other parameters and buffers; and buffers outside it
                           that differ from what transformers computes, as after model.bfloat16(); above 5 GB in shards
                           (fxquant-00001-of-00003.safetensors), with fxquant.safetensors.index.json
    generation_config.json, tokenizer files

The weights are not called `model.safetensors`: transformers would load that without fxquant, fill the weights that it
does not find with random numbers, and warn. So it says that there are no weights, which is true for it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.errors import FileError, FxquantError, nearest
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, find_experts
from fxquant.linears import find_linears
from fxquant.model_index import FORMAT, INDEX, Index, index_from, index_of, read_index
from fxquant.model_tensors import SHARDS, WEIGHTS, collect, held, load, store
from fxquant.modules import QLinear
from fxquant.pretrained import check_size, load_config, load_generation_config, model_class, skeleton
from fxquant.scheme import Scheme
from fxquant.tensor_files import SHARD_SIZE
from fxquant.transformers_weights import untie


def is_model_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `save` made this directory, as far as its file names tell."""
    there = {name for name in (INDEX, WEIGHTS, SHARDS, "config.json") if (Path(path) / name).is_file()}
    return {INDEX, "config.json"} < there


def check_target(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a place where `save` could not write; to be called before hours of work.

    Raises:
        FileError: it cannot be created, or holds something that must not be replaced.
    """
    target = Path(path)
    parent = target.absolute().parent
    if target.absolute().resolve() == Path.cwd():
        raise FileError(f"{target} is the directory that this process is in: give one within it, or another path")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileError(f"{target} exists and is not a directory: give another path")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise FileError(f"{target} is not empty\n  give another path, or --force to replace a model that is there")
        if not is_model_directory(target):
            raise FileError(f"{target} holds something else than a model that fxquant wrote: it is not replaced")
    if not parent.is_dir():
        raise FileError(f"cannot write {target}: there is no directory {parent}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise FileError(f"cannot write {target}: {parent}: {error.strerror or error}") from None


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    recipe: str = "",
    force: bool = False,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write a quantized model of transformers as a directory, which appears complete or not at all.

    Args:
        model: with at least one `QLinear` or `QExperts`; its weights may be on any device but meta.
        path: the directory; must not exist, or be empty.
        tokenizer: its files are written too.
        recipe: for people: what the model was quantized by.
        force: replace the directory where it holds a model that fxquant wrote.
        shard_size: bytes from which on weights are parted into several files.

    Raises:
        FileError: the place cannot be written.
        ModelError: the model is not quantized, is no class of transformers, or has weights without values.
    """
    check_target(path, force=force)
    index = index_of(model, recipe)
    config = config_of(model)
    tensors, index["shared"] = collect(model, build(config, index_from(index, "the model")))
    target = Path(path).absolute()
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        store(tensors, made, shard_size)
        write_texts(made, model, config, index, tokenizer)
        made.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(made, target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_model(path: str | os.PathLike[str]) -> nn.Module:
    """A model that `save` wrote: the same tensors bit for bit, on the CPU, in eval mode.

    Nothing is unpickled and no code of the directory runs; every name, shape and dtype is checked before a tensor is
    read.

    Raises:
        FileError: the directory is not what it should be; says where.
    """
    index = read_index(path)
    model = build(load_config(path), index, held(Path(path)))
    load(model, Path(path), index.shared)
    _check_indices(model, Path(path))
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise FileError(f"{path} cannot be read: {', '.join(empty[:3])} of this {index.model} is in no file")
    found = load_generation_config(Path(path))
    if found is not None:
        model.generation_config = found
    return model


def build(config: Any, index: Index, files: tuple[int, int] | None = None) -> nn.Module:
    """A model without weights, in eval mode: quantized modules in place, parameters and planes on the meta device.

    Args:
        config: of transformers.
        index: what is quantized.
        files: how many tensors they have, and their bytes: a model that they cannot hold is refused.

    Raises:
        FileError: config and index contradict each other, or a linear cannot hold its scheme.
    """
    config = copy.deepcopy(config)
    config.architectures = [index.model]
    # In memory a model is the same whether quantized here or read: its config says nothing of quantization.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton(model_class(config), config, tensors=None if files is None else files[0])
    if files is not None:
        check_size(model, files[1], index.source)
    put_quantized(model, index)
    return model


def put_quantized(model: nn.Module, index: Index) -> None:
    """Put the modules that an index tells in place, with planes that hold nothing yet, on the meta device.

    Raises:
        FileError: the model has no such linears or experts, or they cannot hold their schemes.
    """
    sites = {name: site for site in find_linears(model) for name in site.aliases}
    made: dict[str, nn.Module] = {}
    for name, (scheme, dtype) in index.linears.items():
        site = sites.get(name)
        if site is None or site.obstacle is not None:
            reason = site.obstacle if site else f"the model has no linear of this name{nearest(name, sites)}"
            raise FileError(f"{index.source}: {name} cannot be {scheme}: {reason}")
        misfit = scheme.misfit(site.n, site.k)
        if misfit:
            raise FileError(f"{index.source}: {name} cannot be {scheme}: {misfit}")
        new = QLinear.replacing(site.module, scheme, transposed=site.transposed)
        new.dtype = dtype
        made |= dict.fromkeys(site.aliases, new)
    stacks = {name: site for site in find_experts(model) for name in site.aliases}
    for name in index.experts:
        if name not in stacks:
            raise FileError(f"{index.source}: the model has no experts of the name {name}{nearest(name, stacks)}")
        made |= dict.fromkeys(stacks[name].aliases, _experts(index, name, stacks[name]))
    for name, module in made.items():
        model.set_submodule(name, module)
    untie(model)


def _experts(index: Index, name: str, site: ExpertSite) -> QExperts:
    listed, dtype = index.experts[name]
    schemes: dict[tuple[int, str], Scheme] = {}
    for (e, projection), scheme in listed.items():
        for one in range(site.layout.experts) if e is None else (e,):
            if (one, projection) in schemes:
                raise FileError(f"{index.source}: {name} has two schemes for {one}.{projection}")
            schemes[one, projection] = scheme
    try:
        new = QExperts(site.module, site.layout, schemes)
    except FxquantError as error:
        raise FileError(f"{index.source}: {name}: {error}") from None
    new.dtype = dtype
    return new


def _check_indices(model: nn.Module, path: Path) -> None:
    """What ops take as indices: the experts of each stack, which the index file tells, and the order of columns."""
    for name, module in model.named_modules():
        problem = module.members_problem() if isinstance(module, QExperts) else None
        if problem:
            raise FileError(f"{path / WEIGHTS}: {name}: {problem}")
        if isinstance(module, (QLinear, QExperts)):
            for leaf, plane in module.named_buffers(recurse=False):
                natural = torch.arange(plane.shape[-1], dtype=plane.dtype) if leaf.endswith("perm") else None
                if natural is not None and not torch.equal(plane.sort(-1).values, natural.expand_as(plane)):
                    raise FileError(f"{path / WEIGHTS}: {name}.{leaf} does not name each column once")


def config_of(model: Any) -> Any:
    """The config to write: the model's own, with the dtype that its weights have now."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # what transformers needs to save it
        del config.quantization_config
    config.dtype = model.dtype
    return config


def write_texts(made: Path, model: Any, config: Any, index: Mapping[str, Any], tokenizer: Any) -> None:
    """Put everything but the tensors of a model into a directory.

    Args:
        made: the directory.
        model: whose generation config is written, if it has one.
        config: of transformers.
        index: the content of `fxquant.json`.
        tokenizer: its files are written too; None: there is none.
    """
    texts = {INDEX: json.dumps(index, indent=2)}
    if getattr(model, "generation_config", None) is not None:
        # Its save_pretrained refuses values that contradict each other, which is no reason to lose the model.
        texts["generation_config.json"] = model.generation_config.to_json_string()
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    config.save_pretrained(made)
    data = json.loads((made / "config.json").read_text(encoding="utf-8"))
    data |= {"architectures": [index["model"]], "quantization_config": {"quant_method": "fxquant", "format": FORMAT}}
    for name, text in {**texts, "config.json": json.dumps(data, indent=2)}.items():
        (made / name).write_text(text.rstrip() + "\n", encoding="utf-8")


def _move_into_place(made: Path, target: Path) -> None:
    if not target.exists():
        os.replace(made, target)
        return
    old = made.with_name(f"{made.name}.old")
    os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old)
