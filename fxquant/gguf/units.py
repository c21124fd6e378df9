"""The tensors of a GGUF file, of a checkpoint in any format: the inverse of `fxquant.gguf.weights`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Contents, Reader, Unit
from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.errors import FileError
from fxquant.gguf.files import FLOAT_TYPES, GgufFile
from fxquant.gguf.metadata import head_size, model_settings
from fxquant.gguf.models import GgufModel, gguf_architecture
from fxquant.gguf.names import written_names
from fxquant.gguf.rope import rope_tensors
from fxquant.gguf.sources import Source, gguf_sources, shapes_of
from fxquant.gguf.types import gguf_rows, gguf_type
from fxquant.gguf.weights import is_shifted, is_transposed, row_order
from fxquant.gguf.writing import GgufSpec
from fxquant.scheme import PlaneSpec

_ALWAYS_F32 = ("ffn_gate_inp.", "position_embd.")
"""Parts of names of matrices that llama.cpp takes for float32, as it does all vectors and all that are no `.weight`."""
_VECTORS = "ffn_gate_inp_shexp."
"""Of names of matrices of one row, which are vectors in GGUF."""
_TYPES = {dtype: name for name, dtype in FLOAT_TYPES.items() if name != "F64"}


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a file that is to be written."""

    units: list[Unit]
    """In the order of the model. Blocks are uint8, `[N, bytes of a row]`, or `[E, N, bytes of a row]`."""
    specs: Mapping[str, GgufSpec]
    """What the file says of each, in the order of the units."""


@dataclass(frozen=True)
class _Target:
    """The file that is to be written."""

    file: GgufFile
    """With the metadata that tell the order of rows, and no tensors."""
    model: GgufModel

    def in_file_order(self, tensor: str, rows: Tensor) -> Tensor:
        """Rows of a tensor that stand in the order of the model."""
        order = row_order(self.file, self.model, tensor, len(rows))
        return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)


def gguf_tensors(contents: Contents, own_names: Mapping[str, str]) -> GgufTensors:
    """All tensors of a file with the contents of a checkpoint.

    Vectors, routers and tables of positions become float32, as llama.cpp wants them; all other tensors keep their
    dtype and values. Norms of gemma have 1 added in float32. The output matrix of a model that ties it to its
    embeddings is left out.

    Args:
        contents: with matrices in schemes that `gguf_fit` gave. Matrices that are not quantized are shaped as the
            parameters of the model; those of single experts are `[N, K]`.
        own_names: what the model calls each of `contents.plain`, where it is not what the contents do. A matrix of an
            expert is `<module>.<e>.<projection>.weight`.

    Raises:
        FileError: the model is of a type that is not written, GGUF has no place for a tensor, tensors of the model
            are missing, or are not of its shapes.
    """
    architecture, model = gguf_architecture(contents.config.model_type)
    settings = {"general.architecture": architecture, **model_settings(contents.config)}
    target = _Target(GgufFile(contents.path, settings, {}, {}), model)
    sources = gguf_sources(contents, own_names)
    tied = getattr(contents.model, "all_tied_weights_keys", {})
    own = [name for name in shapes_of(contents.model) if name not in tied]
    names = written_names(architecture, [*own, *(source.name for source in sources)])
    _require_all(contents, sources, {name: names[name] for name in own}, names)
    units: list[Unit] = []
    specs: dict[str, GgufSpec] = {}
    for source in sources:
        unit, described = _unit(target, contents, source, names[source.name])
        # so that heads of a wrong size are found before anything is written
        row_order(target.file, model, names[source.name][0], described[names[source.name][0]].shape[0])
        units.append(unit)
        specs |= described
    if extra := rope_tensors(contents.config, head_size(contents.config)):
        planes = {name: PlaneSpec(tuple(value.shape), value.dtype) for name, value in extra.items()}
        units.append(Unit((), planes, lambda reader: extra))
        specs |= _float_specs(planes)
    return GgufTensors(units, specs)


Names = Mapping[str, tuple[str, ...]]


def _require_all(contents: Contents, sources: list[Source], own: Names, names: Names) -> None:
    """Refuse contents that lack a tensor of the model, or have one twice."""
    made = Counter(tensor for source in sources for tensor in names[source.name])
    missing = sorted(name for name, tensors in own.items() if any(tensor not in made for tensor in tensors))
    twice = sorted(tensor for tensor, count in made.items() if count > 1)
    for fault, found in (("lacks tensors of the model", missing), ("is to give tensors of GGUF twice", twice)):
        if found:
            more = ", ..." if len(found) > 5 else ""
            raise FileError(f"{contents.path} {fault}: {len(found)}\n  {', '.join(found[:5])}{more}")


def _unit(
    target: _Target, contents: Contents, source: Source, tensors: tuple[str, ...]
) -> tuple[Unit, dict[str, GgufSpec]]:
    if source.matrices:
        return _quantized(target, source, tensors[0])
    if source.stacked:
        return _experts(contents, source, tensors[0])
    return _parameter(target, contents, source.keys[0], tensors)


def _quantized(target: _Target, source: Source, tensor: str) -> tuple[Unit, dict[str, GgufSpec]]:
    """Planes: of one matrix, or of one projection of all experts."""
    first = source.matrices[0]
    kind = gguf_type(first.scheme)
    kinds = {gguf_type(matrix.scheme) for matrix in source.matrices}
    if kind is None or len(kinds) > 1 or first.k % LAYOUTS[kind].size:
        found = ", ".join(sorted({f"{m.scheme} of [N={m.n}, K={m.k}]" for m in source.matrices}))
        raise FileError(f"GGUF has no one type for {source.name}, which is {found}")
    lead = (len(source.keys),) if source.stacked else ()
    specs = {tensor: GgufSpec(kind, (*lead, first.n, first.k))}
    row = first.k // LAYOUTS[kind].size * LAYOUTS[kind].nbytes
    planes = {tensor: PlaneSpec((*lead, first.n, row), torch.uint8)}
    if kind == "NVFP4":
        scales = {tensor.removesuffix(".weight") + ".scale": PlaneSpec((len(source.keys),), torch.float32)}
        specs, planes = specs | _float_specs(scales), planes | scales
    return Unit(source.keys, planes, partial(_blocks, target, source, tensor, planes)), specs


def _blocks(
    target: _Target, source: Source, tensor: str, specs: Mapping[str, PlaneSpec], reader: Reader
) -> dict[str, Tensor]:
    out = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    rows = out[tensor] if source.stacked else out[tensor].unsqueeze(0)
    for e, (key, matrix) in enumerate(zip(source.keys, source.matrices, strict=True)):
        planes = reader.planes(key)
        made = gguf_rows(planes, matrix.scheme, matrix.n, matrix.k).cpu()
        rows[e] = made if source.stacked else target.in_file_order(tensor, made)
        for name in out.keys() - {tensor}:
            out[name][e] = planes["scale_scales"].flatten()[0].cpu()
    return out


def _experts(contents: Contents, source: Source, tensor: str) -> tuple[Unit, dict[str, GgufSpec]]:
    """One projection of all experts in full precision, each of which is a tensor of the checkpoint."""
    dtypes = {contents.plain[key].dtype for key in source.keys}
    shape = (len(source.keys), *contents.plain[source.keys[0]].shape)
    dtype = _written(tensor, len(shape), dtypes.pop() if len(dtypes) == 1 else torch.float32, source.keys[0])

    def make(reader: Reader) -> dict[str, Tensor]:
        out = torch.empty(shape, dtype=dtype)
        for e, key in enumerate(source.keys):
            out[e] = reader.tensor(key)
        return {tensor: out}

    planes = {tensor: PlaneSpec(shape, dtype)}
    return Unit(source.keys, planes, make), _float_specs(planes)


def _parameter(
    target: _Target, contents: Contents, key: str, tensors: tuple[str, ...]
) -> tuple[Unit, dict[str, GgufSpec]]:
    """A parameter of the model that is not quantized: one tensor, or the gate's and the up's."""
    stand_in = torch.empty(contents.plain[key].shape, dtype=contents.plain[key].dtype, device="meta")
    parts = dict(zip(tensors, _parts(target, stand_in, tensors), strict=True))
    planes = {
        name: PlaneSpec(tuple(part.shape), _written(name, part.ndim, part.dtype, key)) for name, part in parts.items()
    }

    def make(reader: Reader) -> dict[str, Tensor]:
        made = _parts(target, reader.tensor(key).cpu(), tensors)
        return {
            name: target.in_file_order(name, part).to(planes[name].dtype).contiguous()
            for name, part in zip(tensors, made, strict=True)
        }

    return Unit((key,), planes, make), _float_specs(planes)


def _parts(target: _Target, value: Tensor, tensors: tuple[str, ...]) -> list[Tensor]:
    """A parameter, turned as the file has it, and divided into its tensors."""
    if is_transposed(target.model, tensors[0]):
        value = value.transpose(-1, -2)
    if is_shifted(target.model, tensors[0]):
        value = value.to(torch.float32) + 1.0
    if _VECTORS in tensors[0]:
        value = value.flatten()
    if len(tensors) == 1:
        return [value]
    return [value[:, ::2], value[:, 1::2]] if target.model.interleaved_experts else list(value.chunk(2, 1))


def _written(tensor: str, dims: int, dtype: torch.dtype, key: str) -> torch.dtype:
    if dtype not in _TYPES:
        raise FileError(f"{key} is {dtype}, for which GGUF has no type; it has {', '.join(map(str, _TYPES))}")
    always = dims < 2 or not tensor.endswith(".weight") or any(part in tensor for part in _ALWAYS_F32)
    return torch.float32 if always else dtype


def _float_specs(planes: Mapping[str, PlaneSpec]) -> dict[str, GgufSpec]:
    return {name: GgufSpec(_TYPES[plane.dtype], plane.shape) for name, plane in planes.items()}
