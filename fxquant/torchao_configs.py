"""torchao's configs -> schemes. torchao is never imported: a config is known by its class's name.

A config says two things: how a weight is stored, which is a scheme, and how torchao computes with it (packing for one
kernel, Inductor settings, how scales are searched), which a scheme does not say and is not read. Stored as torchao 0.18
does: https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_api.py

    Int8WeightOnlyConfig()                               int8
    Int8WeightOnlyConfig(granularity=PerGroup(64))       int8-g64-fp32       torchao's int8 and fp8 scales are float32
    Int4WeightOnlyConfig(group_size=64)                  int4-g64-asym       always asymmetric, see `_int4`
    IntxWeightOnlyConfig(torch.int4, PerGroup(32))       int4-g32            scales in our own default dtype unless said
    Float8WeightOnlyConfig(granularity=PerTensor())      fp8-tensor
    Int8DynamicActivationInt8WeightConfig()              int8+int8
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())    fp8+fp8
    NVFP4WeightOnlyConfig()                              nvfp4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from fxquant.errors import SchemeError, nearest
from fxquant.scheme import FLOAT_SCALES, ROW, SCALE_TYPES, TENSOR, Activation, Block, Scheme

_INTEGERS = MappingProxyType({f"torch.int{bits}": f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)})
_SMALL_FLOATS = MappingProxyType({torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8e5m2"})


def is_torchao_config(value: object) -> bool:
    """Whether `value` is an object of torchao's, or its class was derived from one of torchao's."""
    return any(cls.__module__.split(".")[0] == "torchao" for cls in type(value).__mro__)


def scheme_of_torchao(config: object) -> Scheme:
    """The scheme that stores a weight as `config` makes torchao store it.

    Raises:
        SchemeError: a config that no scheme equals, or that is not known here.
    """
    name = type(config).__name__
    read = _READERS.get(name)
    if read is None:
        raise SchemeError(
            f"no scheme equals torchao's {name}{nearest(name, _READERS)}\n  known configs: {', '.join(_READERS)}"
        )
    return read(config)


def _int8(config: Any) -> Scheme:
    # Version 1 of this config has its group in a field of its own; later versions keep the field, empty.
    size = getattr(config, "group_size", None)
    block = _block(config, config.granularity) if size is None else _group(config, size)
    return Scheme("int8", block, "fp32")


def _int8_dynamic(config: Any) -> Scheme:
    activation, weight = _both(config)
    return Scheme("int8", _block(config, weight), "fp32", activation=_activation(config, "int8", activation))


def _intx_dynamic(config: Any) -> Scheme:
    scheme = _intx_scheme(config, config.weight_granularity, config.weight_mapping_type, config.weight_scale_dtype)
    return replace(scheme, activation=_activation(config, "int8", None))


def _int4(config: Any) -> Scheme:
    # Every int4 format of torchao's maps a group's smallest and largest weight to the ends of the codes. Where it keeps
    # the zero as a float offset, the integer zero of a scheme is the nearest there is: the same grid, at most half a
    # step aside, for groups that hold weights of both signs.
    return Scheme("int4", _group(config, config.group_size), "bf16", "int")


def _intx(config: Any) -> Scheme:
    return _intx_scheme(config, config.granularity, config.mapping_type, config.scale_dtype)


def _intx_scheme(config: Any, granularity: Any, mapping_type: Any, scale_dtype: torch.dtype | None) -> Scheme:
    element = _INTEGERS.get(str(config.weight_dtype))
    if element is None:
        raise _unequal(config, f"weight_dtype={config.weight_dtype}", ", ".join(_INTEGERS))
    asym = "-asym" if mapping_type.name == "ASYMMETRIC" else ""
    scheme = Scheme.parse(f"{element}-{_block(config, granularity)}{asym}")
    if scale_dtype is None:
        return scheme
    dtypes = {name: SCALE_TYPES[name].dtype for name in FLOAT_SCALES}
    for name, dtype in dtypes.items():
        if dtype == scale_dtype:
            return replace(scheme, scale=name)
    raise _unequal(config, f"scale_dtype={scale_dtype}", ", ".join(map(str, dtypes.values())))


def _float8(config: Any) -> Scheme:
    return Scheme(_small_float(config, config.weight_dtype), _block(config, config.granularity), "fp32")


def _float8_dynamic(config: Any) -> Scheme:
    activation, weight = _both(config)
    element = _small_float(config, config.weight_dtype)
    return Scheme(element, _block(config, weight), "fp32", activation=_activation(config, "fp8", activation))


def _nvfp4(config: Any) -> Scheme:
    return Scheme.parse("nvfp4" if config.use_dynamic_per_tensor_scale else "e2m1-g16-e4m3")


def _small_float(config: Any, dtype: torch.dtype) -> str:
    if dtype not in _SMALL_FLOATS:
        raise _unequal(config, f"weight_dtype={dtype}", ", ".join(map(str, _SMALL_FLOATS)))
    return _SMALL_FLOATS[dtype]


def _both(config: Any) -> tuple[Any, Any]:
    """The granularities of activation and weight: a config has one for both, or a list of two."""
    granularity = config.granularity
    first, second = granularity if isinstance(granularity, (list, tuple)) else (granularity, granularity)
    return first, second


def _activation(config: Any, element: Literal["int8", "fp8"], granularity: Any) -> Activation:
    """How a config quantizes activations; without a granularity, per token."""
    mapping = getattr(config, "act_mapping_type", None)
    if mapping is not None and mapping.name != "SYMMETRIC":
        raise _unequal(config, f"act_mapping_type={mapping.name}", "MappingType.SYMMETRIC")
    dtype = getattr(config, "activation_dtype", torch.float8_e4m3fn)
    if dtype != torch.float8_e4m3fn:
        raise _unequal(config, f"activation_dtype={dtype}", str(torch.float8_e4m3fn))
    if granularity is None or type(granularity).__name__ == "PerRow":
        return Activation(element)
    shape = tuple(getattr(granularity, "block_size", ()))
    if type(granularity).__name__ == "PerBlock" and len(shape) == 2 and shape[0] == 1:
        return Activation(element, group=shape[1])
    raise _unequal(config, f"activations in {granularity}", "PerRow(), PerBlock((1, 128))")


def _block(config: Any, granularity: Any) -> Block:
    """Which weights of `[N, K]` share a scale under a granularity."""
    match type(granularity).__name__:
        case "PerTensor":
            return TENSOR
        case "PerRow" if granularity.dim in (-1, 1):
            return ROW
        case "PerAxis" if granularity.axis == 0:
            return ROW
        case "PerGroup":
            return _group(config, granularity.group_size)
        case "PerBlock" if len(granularity.block_size) == 2:
            rows, columns = granularity.block_size
            return Block(int(rows), int(columns))
    known = "PerTensor(), PerRow(), PerAxis(0), PerGroup(size), PerBlock((128, 128))"
    raise _unequal(config, f"granularity={granularity}", known)


def _group(config: Any, size: object) -> Block:
    if not isinstance(size, int) or size < 1:
        raise _unequal(config, f"group size {size!r}", "a whole number from 1 on")
    return Block(1, size)


def _unequal(config: object, found: str, known: str) -> SchemeError:
    return SchemeError(f"no scheme equals torchao's {type(config).__name__} with {found}\n  known there: {known}")


_READERS: Mapping[str, Callable[[Any], Scheme]] = MappingProxyType(
    {
        "Int8WeightOnlyConfig": _int8,
        "Int4WeightOnlyConfig": _int4,
        "IntxWeightOnlyConfig": _intx,
        "Float8WeightOnlyConfig": _float8,
        "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
        "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
        "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
        "NVFP4WeightOnlyConfig": _nvfp4,
    }
)
