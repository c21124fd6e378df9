"""What is in a checkpoint, as tables for people: read from the config and from the headers of its safetensors files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fxquant.errors import FileError
from fxquant.experts import find_experts, find_unread_experts
from fxquant.linears import find_linears, find_stacked
from fxquant.model_files import build, is_model_directory
from fxquant.model_index import read_index
from fxquant.model_report import report
from fxquant.plans import merged_name, name_pattern
from fxquant.pretrained import load_config, model_class, skeleton
from fxquant.tables import Table, bytes_text

_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    "F4": 4,
}
"""Bits of an element by the dtype names of safetensors headers; 8 where not named."""


class _Weight(NamedTuple):
    """A matmul weight of the model."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    note: str


def checkpoint_tables(source: str, *, full: bool = False) -> list[Table]:
    """Tables that say what is in a checkpoint; no weights are read.

    Args:
        source: directory of a checkpoint, or hub id (then only what follows from the config is known).
        full: one row per weight.

    Raises:
        FileError: the checkpoint cannot be read.
    """
    config = load_config(source)
    files = _tensor_table(Path(source)) if Path(source).is_dir() else None
    if is_model_directory(source):
        model = build(config, read_index(source))
        return [_summary(source, config, model, _ours(source)), *filter(None, [files]), report(model).table(full=full)]
    model = skeleton(model_class(config), config, buffers=False)
    weights = _weights_table(model, full)
    return [_summary(source, config, model, _quantization(config)), *filter(None, [files]), weights]


def _summary(source: str, config: Any, model: nn.Module, quantization: str) -> Table:
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters())
    rows = (
        ("class", type(model).__name__),
        ("model type", str(config.model_type)),
        ("dtype", ", ".join(dtypes)),
        ("quantization", quantization),
    )
    return Table(title="checkpoint", columns=("directory", source), rows=rows)


def _ours(source: str) -> str:
    index = read_index(source)
    linears = Counter(str(scheme) for scheme, _ in index.linears.values())
    stacks = Counter(str(scheme) for schemes, _ in index.experts.values() for scheme in set(schemes.values()))
    counts = ", ".join(
        f"{count} {what} in {name}"
        for what, found in (("linears", linears), ("stacks of experts", stacks))
        for name, count in found.items()
    )
    return f"fxquant: {counts}" + (f"; recipe {index.recipe}" if index.recipe else "")


def _quantization(config: Any) -> str:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "none"
    data = found if isinstance(found, dict) else found.to_dict()
    plain = {k: v for k, v in data.items() if isinstance(v, (str, int, float)) and k != "quant_method"}
    details = ", ".join(f"{key}={value}" for key, value in list(plain.items())[:8])
    return f"{data.get('quant_method', 'unknown method')}" + (f" ({details})" if details else "")


def _tensor_table(folder: Path) -> Table | None:
    """The tensors of all safetensors files by dtype; None where there are no such files."""
    totals: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for dtype, shape in _headers(file):
            count = totals.setdefault(dtype, [0, 0, 0])
            elements = math.prod(shape)
            count[0] += 1
            count[1] += elements
            count[2] += elements * _BITS.get(dtype, 8) // 8
    rows = [(dtype, str(n), f"{elements:,}", bytes_text(size)) for dtype, (n, elements, size) in totals.items()]
    size = bytes_text(sum(file.stat().st_size for file in files))
    return (
        Table(
            title="tensors in the files",
            columns=("dtype", "tensors", "elements", "bytes"),
            rows=tuple(rows),
            right=frozenset({1, 2, 3}),
            notes=(f"{len(files)} safetensors files, {size}",),
        )
        if files
        else None
    )


def _headers(file: Path) -> Iterator[tuple[str, list[int]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a mapping)
                header = stored.get_slice(name)
                yield str(header.get_dtype()), list(header.get_shape())
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {file}: {error}") from None


def _weights_table(model: nn.Module, full: bool) -> Table:
    """Linears and expert stacks of the model, and what can be quantized of them."""
    groups: dict[Any, list[_Weight]] = {}
    for weight in _weights(model):
        key = weight.name if full else (name_pattern(weight.name), *weight[1:])
        groups.setdefault(key, []).append(weight)
    rows = [
        (
            merged_name([w.name for w in group]),
            "x".join(map(str, group[0].shape)),
            group[0].kind,
            bytes_text(sum(w.nbytes for w in group)),
            group[0].note,
        )
        for group in groups.values()
    ]
    weights = sum(math.prod(w.shape) for group in groups.values() for w in group)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Table(
        title="matmul weights",
        columns=("weight", "shape", "kind", "bytes", "note"),
        rows=tuple(rows),
        right=frozenset({3}),
        notes=(
            f"{weights:,} weights of linears and experts; the model has {parameters:,} parameters, {bytes_text(size)}",
        ),
    )


def _weights(model: nn.Module) -> Iterator[_Weight]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for site in find_linears(model):
        weight = site.module._parameters.get("weight")
        nbytes = 0 if weight is None else weight.numel() * weight.element_size()
        others = [name for name in names.get(id(weight), ()) if name.rpartition(".")[0] not in site.aliases]
        note = site.obstacle or (f"shared with {', '.join(others)}" if others else "")
        yield _Weight(site.name, (site.n, site.k), type(site.module).__name__, nbytes, note)
    sites, unread = find_experts(model), find_unread_experts(model)
    experts = {
        f"{name}.{p.parameter}": site.layout.experts
        for site in sites
        for name in site.aliases
        for p in site.layout.projections
    }
    for stack in find_stacked(model):
        kind = f"{experts[stack.name]} experts" if stack.name in experts else "stack"
        yield _Weight(stack.name, stack.shape, kind, stack.nbytes, unread.get(stack.module_name, ""))
