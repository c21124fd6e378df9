"""The MXFP4 experts of gpt-oss: stacks of blocks, one for each projection of a layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Reader, Unit, Writer
from fxquant.checkpoints.gpt_oss import gpt_oss_obstacles, tensors_of_gpt_oss
from fxquant.errors import FileError
from fxquant.scheme import PlaneSpec, Scheme
from fxquant.writers.nearest import alike, choose
from fxquant.writers.settings import require_quantized
from fxquant.writers.units import plain_units, specs_of

_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_STACKS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Projections whose rows alternate in a stack."""
_FULL_PRECISION = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def fit(matrices: Mapping[str, Matrix]) -> dict[str, Fit]:
    """Experts in `mxfp4`, all else in full precision, and so are experts with K that is no multiple of 32."""
    found = {}
    for key, matrix in matrices.items():
        scheme = matrix.scheme
        if _EXPERT.fullmatch(matrix.name):
            others = (*alike(scheme, ()), Scheme.parse("mxfp4"))
            found[key] = choose("gpt-oss", scheme, matrix.n, matrix.k, gpt_oss_obstacles, others)
        else:
            found[key] = Fit(None, "gpt-oss has quantized experts, and all else in full precision")
    return found


def units(contents: Contents) -> Iterator[Unit]:
    """`..._blocks` and `..._scales` of each stack, and all other tensors.

    Raises:
        FileError: the model is not gpt-oss; a quantized matrix is no expert's; a stack lacks one.
    """
    stacks = _stacks(contents)
    for (module, projection), rows in stacks.items():
        yield _unit(f"{module}.{projection}", rows)
    yield from plain_units(contents)


def config(contents: Contents) -> dict[str, Any]:
    """As it was published.

    Raises:
        FileError: by `units`.
    """
    _stacks(contents)
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(_FULL_PRECISION)}


def _stacks(contents: Contents) -> dict[tuple[str, str], list[list[Matrix]]]:
    """The matrices of each stack: for each expert those whose rows alternate."""
    kind = getattr(contents.config, "model_type", None)
    if kind != "gpt_oss":
        raise FileError(f"{contents.path}: the format is that of gpt-oss, and this is {kind}\n  choose another format")
    require_quantized(contents, "gpt-oss")
    found: dict[str, dict[tuple[int, str], Matrix]] = {}
    for name, matrix in contents.matrices.items():
        parts = _EXPERT.fullmatch(name)
        if parts is None:
            raise FileError(f"{contents.path}: gpt-oss has {name} in full precision\n  it cannot be {matrix.scheme}")
        found.setdefault(parts[1], {})[int(parts[2]), parts[3]] = matrix
    return {
        (module, stack): _complete(contents, module, experts, projections)
        for module, experts in found.items()
        for stack, projections in _STACKS.items()
        if any(projection in projections for _, projection in experts)
    }


def _complete(
    contents: Contents, module: str, experts: Mapping[tuple[int, str], Matrix], projections: tuple[str, ...]
) -> list[list[Matrix]]:
    count = getattr(contents.config, "num_local_experts", 0)
    wanted = [[(expert, projection) for projection in projections] for expert in range(count)]
    have = {place: (m.n, m.k) for place, m in experts.items() if place[1] in projections}
    lacking = [place for row in wanted for place in row if place not in have]
    if lacking or len(have) != count * len(projections) or len(set(have.values())) != 1:
        fact = f"lacks {module}.{lacking[0][0]}.{lacking[0][1]}" if lacking else "has others, or of other sizes"
        raise FileError(
            f"{contents.path}: gpt-oss stacks the {count} experts of {module}, and it {fact}\n"
            "  quantize all experts of a layer, or none"
        )
    return [[experts[place] for place in row] for row in wanted]


def _unit(stack: str, rows: list[list[Matrix]]) -> Unit:
    first = rows[0][0]
    specs = specs_of(tensors_of_gpt_oss, first.scheme, first.n, first.k)
    tensors = {
        f"{stack}_{part}": PlaneSpec((len(rows), first.n * len(rows[0]), *spec.shape[1:]), spec.dtype)
        for part, spec in specs.items()
    }
    names = tuple(tuple(matrix.name for matrix in row) for row in rows)
    make = functools.partial(_stacked, stack, names, tensors, first)
    return Unit(tuple(name for row in names for name in row), tensors, make)


def _stacked(
    stack: str, names: tuple[tuple[str, ...], ...], specs: Mapping[str, PlaneSpec], like: Matrix, reader: Reader
) -> dict[str, Tensor]:
    made = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    for expert, row in enumerate(names):
        for i, name in enumerate(row):
            parts = tensors_of_gpt_oss(like.scheme, reader.planes(name), like.n, like.k)
            for part, tensor in parts.items():
                made[f"{stack}_{part}"][expert, i :: len(row)] = tensor
    return made


WRITER_OF_GPT_OSS = Writer(fit, units, config)
