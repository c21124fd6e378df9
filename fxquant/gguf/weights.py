"""The weights of a GGUF file as a transformers model has them: quantized ones as planes, all others as tensors.

What converters changed is undone on the rows of blocks, which leaves every block as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxquant.checkpoints import Planes, planes_of_gguf
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError, FileError
from fxquant.expert_layouts import expert_name
from fxquant.gguf.configs import head_dim, size
from fxquant.gguf.files import FLOAT_TYPES, GgufFile
from fxquant.gguf.header import GgufTensor
from fxquant.gguf.models import GgufModel, gguf_model
from fxquant.gguf.names import Match, has_experts, is_experts, match_names

_NO_LINEARS = ("token_embd.", "position_embd.", "ffn_gate_inp.")
"""Tensors that no linear of a model has, whatever their type: embeddings, and routers of experts."""
_FUSED = ("gate_proj", "up_proj")
_CHUNK = 1 << 24
"""Weights that are decoded at once."""

Shapes = Mapping[str, Sequence[int]]
"""Of all parameters of a model, by name: `{name: tensor.shape for name, tensor in model.state_dict().items()}`."""


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is read and decoded when it is asked for, by `[...]`, as slices of safetensors files are."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def __getitem__(self, index: object) -> Tensor:
        """The tensor, or a part of it."""
        return self.read()[index]  # type: ignore[index]


def gguf_weights(file: GgufFile, shapes: Shapes) -> list[StoredWeight]:
    """The quantized matrices of linears and experts, in the order of the model.

    Tensors that are quantized and belong to no linear, embeddings above all, are not among them: `gguf_plain` has
    them decoded. The scale of activations that NVFP4 files may have, `.input_scale`, is left out.

    Args:
        file: of an architecture in `fxquant.gguf.models.MODELS`.
        shapes: of the model.

    Returns:
        Names as the model's modules have them, `model.layers.0.self_attn.q_proj`; of experts, `<module>.<e>.gate_proj`.

    Raises:
        FileError: the file is of another architecture, or has other tensors than the model.
    """
    model = _model(file)
    found: list[StoredWeight] = []
    for match in match_names(file, shapes):
        for tensor in match.tensors:
            if _is_matrix(file.headers[tensor], tensor):
                found.extend(_stored(file, model, match, tensor, shapes[match.name]))
    return found


def gguf_plain(file: GgufFile, shapes: Shapes, dtype: torch.dtype | None = None) -> dict[str, PlainTensor]:
    """Everything else: by the names of the model's parameters.

    Args:
        file: of an architecture in `fxquant.gguf.models.MODELS`.
        shapes: of the model.
        dtype: of the result; None: that of the file, and float32 of what is quantized, computed or joined.

    Returns:
        Tensors of the shapes of the model. Quantized embeddings and routers are decoded.

    Raises:
        FileError: the file is of another architecture, has other tensors than the model, or of other shapes.
    """
    model = _model(file)
    found = {}
    for match in match_names(file, shapes):
        matrices = [_is_matrix(file.headers[name], name) for name in match.tensors]
        if all(matrices):
            continue
        shape = tuple(shapes[match.name])
        if any(matrices) or not _fits(file, model, match, shape):
            have = ", ".join(f"{t} {file.headers[t].type_name} {list(file.headers[t].shape)}" for t in match.tensors)
            raise FileError(f"{file.path}: {match.name} of the model is {list(shape)}, and cannot be made of {have}")
        found[match.name] = PlainTensor(shape, partial(_plain, file, model, match, shape, dtype))
    return found


def _model(file: GgufFile) -> GgufModel:
    return gguf_model(file.architecture, has_experts(file.headers))


def _is_matrix(header: GgufTensor, name: str) -> bool:
    linear = header.type_name not in FLOAT_TYPES and len(header.shape) > 1 and name.endswith(".weight")
    return linear and not any(part in name for part in _NO_LINEARS)


def _stored(
    file: GgufFile, model: GgufModel, match: Match, tensor: str, shape: Sequence[int]
) -> Iterator[StoredWeight]:
    header = file.headers[tensor]
    scale = _scale(file, tensor)
    if len(header.shape) != len(shape) or (len(shape) > 2 and header.shape[0] != shape[0]):
        raise FileError(f"{file.path}: {tensor} is {list(header.shape)}, and {match.name} of the model {list(shape)}")
    if not is_experts(tensor):
        pieces = {"blocks": Piece(tensor)} | ({"scale": Piece(scale)} if scale else {})
        read = partial(_read, header.type_name, row_order(file, model, tensor, header.shape[-2]), None)
        yield StoredWeight(match.name.removesuffix(".weight"), pieces, read)
        return
    owner = match.name.rpartition(".")[0]
    kind = tensor.removesuffix("_exps.weight").rpartition("ffn_")[2]
    parts = _FUSED if kind == "gate_up" else (f"{kind}_proj",)
    for e in range(header.shape[0]):
        pieces = {"blocks": Piece(tensor, e)} | ({"scale": _scale_piece(file, scale, e)} if scale else {})
        for part, projection in enumerate(parts):
            share = (part, len(parts)) if len(parts) > 1 else None
            yield StoredWeight(expert_name(owner, e, projection), pieces, partial(_read, header.type_name, None, share))


def _scale(file: GgufFile, tensor: str) -> str | None:
    name = tensor.removesuffix(".weight") + ".scale"
    return name if name in file.headers else None


def _scale_piece(file: GgufFile, name: str, e: int) -> Piece:
    return Piece(name, e if file.headers[name].shape != (1,) else None)


def _read(
    type_name: str,
    order: Tensor | None,
    share: tuple[int, int] | None,
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
) -> Planes:
    """`StoredWeight.read`: the blocks in the order of the model's rows, or one of equal shares of them."""
    blocks = tensors["blocks"]
    if blocks.ndim != 2 or (order is not None and len(order) != len(blocks)):
        raise CheckpointError(f"GGUF {type_name} weight of shape [N={n}, K={k}]: its blocks are {list(blocks.shape)}")
    if order is not None:
        blocks = blocks[order]
    if share is not None:
        rows = len(blocks) // share[1]
        blocks = blocks[share[0] * rows : (share[0] + 1) * rows]
    return planes_of_gguf(blocks, type_name, n, k, scale=tensors.get("scale"))


def row_order(file: GgufFile, model: GgufModel, tensor: str, n: int) -> Tensor | None:
    """Which row of a tensor is which of the model's: int64 `[N]`; None where they are the same.

    Args:
        file: which holds the tensor.
        model: what files of its architecture hold.
        tensor: its name, of a weight or a bias.
        n: its rows.

    Raises:
        FileError: N does not consist of heads.
    """
    kind = tensor.rpartition(".")[0].rpartition(".")[2]
    if model.rope_pairs and kind in ("attn_q", "attn_k"):
        heads = size(file, "attention.head_count")
        if kind == "attn_k" and file.value("attention.head_count_kv") is not None:
            heads = size(file, "attention.head_count_kv")
        if n != heads * head_dim(file) or n % (2 * heads):
            raise FileError(f"{file.path}: {tensor} has {n} rows, not {heads} heads of {head_dim(file)}")
        return torch.arange(n).view(heads, -1, 2).transpose(1, 2).flatten()
    if model.grouped_qkv and kind == "attn_qkv":
        return _grouped(file, tensor, n)
    return None


def _grouped(file: GgufFile, tensor: str, n: int) -> Tensor:
    heads, dim = size(file, "attention.head_count"), head_dim(file)
    groups = size(file, "attention.head_count_kv") if file.value("attention.head_count_kv") is not None else 1
    if heads % groups or n != (heads + 2 * groups) * dim:
        raise FileError(f"{file.path}: {tensor} has {n} rows, not {heads} + 2 * {groups} heads of {dim}")
    rows = torch.arange(n).view(-1, dim)
    q, k, v = rows.split((heads, groups, groups))
    parts = (q.view(groups, -1, dim), k.unsqueeze(1), v.unsqueeze(1))
    return torch.cat(parts, 1).flatten()


def _fits(file: GgufFile, model: GgufModel, match: Match, shape: tuple[int, ...]) -> bool:
    """Whether tensors have as many weights, in the same order, as a parameter of the model."""
    have = [file.headers[name].shape for name in match.tensors]
    if len(have) > 1 and len(have[0]) < 2:
        return False
    if any(len(one) != len(have[0]) or one[:1] != have[0][:1] or one[2:] != have[0][2:] for one in have):
        return False
    joined = have[0] if len(have) == 1 else (have[0][0], sum(one[1] for one in have), *have[0][2:])
    if is_transposed(model, match.tensors[0]) and len(joined) > 1:
        joined = (*joined[:-2], joined[-1], joined[-2])
    # vectors may have a dimension of 1 more
    return joined == shape or tuple(d for d in joined if d > 1) == tuple(d for d in shape if d > 1)


def is_transposed(model: GgufModel, tensor: str) -> bool:
    """Whether the matrices of a tensor of this name are `[K, N]` in transformers, and stacks of them `[E, K, N]`."""
    if model.interleaved_experts:
        return is_experts(tensor) and tensor.endswith(".weight")
    return model.conv1d and tensor.startswith("blk.") and tensor.endswith(".weight") and "norm" not in tensor


def is_shifted(model: GgufModel, tensor: str) -> bool:
    """Whether a tensor of this name has 1 added, in float32."""
    return model.norms_plus_one and tensor.endswith("norm.weight")


def _plain(file: GgufFile, model: GgufModel, match: Match, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    shifted = is_shifted(model, match.tensors[0])
    parts = [_values(file, name, None if shifted else dtype) for name in match.tensors]
    if len(parts) == 1:
        value = parts[0]
        order = row_order(file, model, match.tensors[0], value.shape[0])
        value = value if order is None else value[order]
    elif model.interleaved_experts:
        value = torch.stack(parts, 2).flatten(1, 2)
    else:
        value = torch.cat(parts, 1)
    if shifted:
        # in float32 even where the file has less: what is left has more digits than what it was part of
        value = value.to(torch.float32) - 1.0
    if is_transposed(model, match.tensors[0]):
        value = value.transpose(-1, -2)
    value = value.reshape(shape).contiguous()
    return value if dtype is None else value.to(dtype)


def _values(file: GgufFile, name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor of a file, decoded if it is quantized; in pieces, so that all of it is never there in float32."""
    header = file.headers[name]
    if header.type_name in FLOAT_TYPES:
        return file.tensor(name)
    blocks, k = file.tensor(name), header.shape[-1]
    blocks = blocks.view(-1, blocks.shape[-1])
    scale = _scale(file, name)
    extra = None if scale is None else file.tensor(scale)
    out = torch.empty((len(blocks), k), dtype=dtype or torch.float32)
    step = max(1, _CHUNK // k)
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        try:
            scheme, planes = planes_of_gguf(part, header.type_name, len(part), k, scale=extra)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {file.path}: {error}") from error
        out[first : first + step] = dequantize(planes, scheme, len(part), k, out.dtype)
    return out.view(header.shape)
