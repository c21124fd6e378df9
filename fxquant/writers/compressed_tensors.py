"""compressed-tensors, as llm-compressor writes it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Unit, Writer
from fxquant.checkpoints.compressed_tensors_layouts import BITS, Layout, compressed_tensors_obstacles, layout_of
from fxquant.checkpoints.compressed_tensors_tensors import tensors_of_compressed_tensors
from fxquant.scheme import FLOAT_SCALES, Activation, Scheme
from fxquant.writers.nearest import alike, choose, integers
from fxquant.writers.settings import left_out, require_quantized, shared
from fxquant.writers.units import all_units

VERSION = "0.20.0"
"""Of compressed-tensors, whose layout this is."""
_LABEL = "compressed-tensors"
_LIKE = {"fp8e5m2": "fp8", "e3m2": "e2m3"}
"""Floats that it lacks, and those of as many bits that it has."""
_Group = tuple[Layout, Activation | None]


def fit(matrices: Mapping[str, Matrix]) -> dict[str, Fit]:
    """Each matrix by itself.

    The same scheme where it is `mxfp4`, `mxfp6`, `mxfp8` or `nvfp4`; or where it consists of integers with integer
    zero points or none in groups that are equal parts of a row, or of `fp8`, also in blocks, with scales of one level;
    inputs may be quantized. Else the same codes and blocks with scales that are
    floats, or without quantized inputs; the other float of as many bits; or else integers of 2 to 8 bits, see
    `fxquant.writers.nearest.integers`.
    """
    fit_of = functools.cache(_fit)
    return {key: fit_of(matrix.scheme, matrix.n, matrix.k) for key, matrix in matrices.items()}


def _fit(scheme: Scheme, n: int, k: int) -> Fit:
    if scheme == Scheme.parse("nvfp4"):
        return Fit(scheme, "its second-level scale is stored as its reciprocal, and may change in the last place")
    others = itertools.chain(_others(scheme), integers(scheme, n, k, BITS, _scale(scheme)))
    return choose(_LABEL, scheme, n, k, compressed_tensors_obstacles, others)


def _others(scheme: Scheme) -> Iterator[Scheme]:
    scales = (_scale(scheme), *FLOAT_SCALES)
    yield from alike(scheme, scales)
    if scheme.element in _LIKE:
        yield from alike(replace(scheme, element=_LIKE[scheme.element]), scales)


def _scale(scheme: Scheme) -> str:
    return scheme.scale if scheme.scale in ("fp16", "bf16") else "bf16"


def units(contents: Contents) -> Iterator[Unit]:
    """The tensors of the format that each matrix has, and all other tensors.

    Raises:
        FileError: there is no quantized matrix.
    """
    require_quantized(contents, _LABEL)
    return all_units(contents, tensors_of_compressed_tensors)


def config(contents: Contents) -> dict[str, Any]:
    """One group for all linears, or one with the names of its modules for each of several settings.

    Raises:
        FileError: there is no quantized matrix.
    """
    require_quantized(contents, _LABEL)
    groups = shared({name: _options(matrix) for name, matrix in contents.matrices.items()})
    formats = {layout.format for layout, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(group, ["Linear"] if len(groups) == 1 else _names(contents, names))
            for i, (group, names) in enumerate(groups.items())
        },
        "ignore": left_out(contents),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _names(contents: Contents, names: list[str]) -> list[str]:
    """As the files call the modules, and as the model does."""
    matrices = [contents.matrices[name] for name in names]
    return list(dict.fromkeys(name for matrix in matrices for name in (matrix.name, matrix.own)))


def _options(matrix: Matrix) -> list[_Group]:
    """The settings of a matrix; one scale for each row is also one for each group of K columns."""
    layout = layout_of(matrix.scheme, matrix.n, matrix.k)
    found, integer = [layout], layout.format in ("pack-quantized", "int-quantized")
    if integer and layout.strategy == "channel":
        found.append(replace(layout, strategy="group", group_size=matrix.k))
    elif integer and layout.group_size == matrix.k:
        found.append(replace(layout, strategy="channel", group_size=None))
    return [(each, matrix.scheme.activation) for each in found]


def _group(group: _Group, targets: list[str]) -> dict[str, Any]:
    layout, activation = group
    weights = {
        "num_bits": layout.bits,
        "type": layout.type,
        "symmetric": layout.symmetric,
        "strategy": layout.strategy,
        "group_size": layout.group_size,
        "block_structure": None if layout.block is None else list(layout.block),
        "dynamic": False,
        "actorder": None,
        "scale_dtype": layout.scale_dtype,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if activation is None else _inputs(activation),
        "output_activations": None,
        "format": layout.format,
    }


def _inputs(activation: Activation) -> dict[str, Any]:
    grouped = "group" if activation.group else "token"
    return {
        "num_bits": 8,
        "type": "int" if activation.element == "int8" else "float",
        "symmetric": True,
        "strategy": "tensor" if activation.static else grouped,
        "group_size": activation.group or None,
        "block_structure": None,
        "dynamic": not activation.static,
        "actorder": None,
        "scale_dtype": None,
    }


WRITER_OF_COMPRESSED_TENSORS = Writer(fit, units, config)
