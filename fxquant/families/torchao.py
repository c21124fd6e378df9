"""torchao's safetensors: tensor subclasses taken apart, with their attributes in the metadata."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_torchao
from fxquant.checkpoints.stored import StoredWeight
from fxquant.errors import CheckpointError
from fxquant.families.activations import Element
from fxquant.families.settings import Settings
from fxquant.families.tensors import modules, read_with_activation, require
from fxquant.scheme import Activation

ANCHOR = "_weight_qdata"
SUFFIXES = (ANCHOR, *(f"_weight_{part}" for part in ("scale", "zero_point", "scale_and_zero", "per_tensor_scale")))
SUFFIXES += tuple(f"_weight_{part}" for part in ("act_per_tensor_scale", "act_pre_scale"))
KINDS = (
    *("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"),
    *("NVFP4Tensor", "MXTensor", "Int4TilePackedTo4dTensor"),
)
_BITS = {f"int{bits}": bits for bits in range(1, 9)}
_ACTIVATIONS: Mapping[str, Element] = {"QuantizeTensorToInt8Kwargs": "int8", "QuantizeTensorToFloat8Kwargs": "fp8"}
_LONGEST = 1 << 16


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `_weight_qdata`, by the class and the attributes that the metadata give it.

    Raises:
        CheckpointError: metadata that are missing, contradict the tensors, or cannot be read.
    """
    result = []
    for module, pieces in modules(files, SUFFIXES, (ANCHOR,)).items():
        entry = _entry(files, f"{module}.weight")
        kind = entry.word("_type", known=KINDS)
        attributes = entry.inner("_data")
        names = [f"_weight_{name}" for name in entry.names("_tensor_data_names")]
        require(module, pieces, *names)
        if "_weight_act_pre_scale" in pieces:
            raise entry.error("its input is scaled before it is quantized", "such weights cannot be read")
        if attributes.flag("is_swizzled_scales"):
            raise entry.error("its scales are swizzled for a GPU", "only scales in order can be read")
        read = functools.partial(
            read_with_activation,
            call=_read,
            activation=_activation(attributes),
            kind=kind,
            block_size=_block(attributes, kind),
            bits=_bits(attributes, kind),
        )
        result.append(StoredWeight(module, pieces, read))
    return result


def _read(*args: Any, block_size: tuple[int, int], **settings: Any) -> Any:
    """`planes_of_torchao`, where -1 stands for a whole dimension."""
    _, n, k = args
    rows, columns = (whole if size == -1 else size for size, whole in zip(block_size, (n, k), strict=True))
    return planes_of_torchao(*args, block_size=(rows, columns), **settings)


def _entry(files: CheckpointFiles, name: str) -> Settings:
    place = f"the metadata of {name}"
    text = files.metadata.get(name)
    if text is None or len(text) > _LONGEST:
        raise CheckpointError(f"{files.path} has {ANCHOR} and not {place}, or too long ones\n  torchao writes both")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place} are not JSON\n  the file is damaged") from None
    return Settings("metadata", {"it": values}).inner("it") if not isinstance(values, dict) else Settings(place, values)


def _block(attributes: Settings, kind: str) -> tuple[int, int]:
    size = attributes.get("block_size")
    if isinstance(size, int) and kind in ("NVFP4Tensor", "MXTensor"):
        return 1, attributes.integer("block_size")
    if not isinstance(size, list) or len(size) != 2:
        raise attributes.error("block_size has to be rows and columns")
    rows, columns = (Settings(attributes.place, {"block_size": part}).integer("block_size", low=-1) for part in size)
    if rows == 0 or columns == 0:
        raise attributes.error("block_size has a zero")
    return rows, columns


def _bits(attributes: Settings, kind: str) -> int:
    """Of a code in int8; of all classes but one, 8."""
    if kind != "IntxUnpackedToInt8Tensor":
        return 8
    return _BITS[attributes.inner("target_dtype").word("_data", known=_BITS)]


def _activation(attributes: Settings) -> Activation | None:
    """How inputs are quantized: symmetric codes for each token, where a scheme says it."""
    quantized = attributes.inner("act_quant_kwargs")
    element = _ACTIVATIONS.get(str(quantized.get("_type")))
    data = quantized.inner("_data")
    rows = data.inner("granularity").get("_type") == "PerRow"
    symmetric = data.inner("mapping_type").get("_data") in (None, "SYMMETRIC")
    if element is None or not rows or not symmetric:
        return None
    return Activation(element)
