"""torchao's weight-only configs -> schemes. torchao is never imported: a config is known by its class's name.

A config says two things: how a weight is stored, which is a scheme, and how torchao computes with it (packing for one
kernel, Inductor settings, how scales are searched), which a scheme does not say and is not read. Stored as torchao 0.18
does: https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_api.py

    Int8WeightOnlyConfig()                               int8
    Int8WeightOnlyConfig(granularity=PerGroup(64))       int8-g64-fp32       torchao's int8 and fp8 scales are float32
    Int4WeightOnlyConfig(group_size=64)                  int4-g64-asym       always asymmetric, see `_int4`
    IntxWeightOnlyConfig(torch.int4, PerGroup(32))       int4-g32            scales in our own default dtype unless said
    Float8WeightOnlyConfig(granularity=PerTensor())      fp8-tensor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from fxquant.errors import SchemeError, nearest
from fxquant.scheme import ROW, SCALE_DTYPES, TENSOR, Block, Scheme

_INTEGERS = {"torch.int8": "int8", "torch.int4": "int4"}


def is_torchao_config(value: object) -> bool:
    """Whether `value` is an object of torchao's, or its class was derived from one of torchao's."""
    return any(cls.__module__.split(".")[0] == "torchao" for cls in type(value).__mro__)


def scheme_of_torchao(config: object) -> Scheme:
    """The scheme that stores a weight as `config` makes torchao store it.

    Raises:
        SchemeError: a config that quantizes activations too, that no scheme equals, or that is not known here.
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
    return Scheme("int8", _block(config) if size is None else _group(config, size), "fp32")


def _int4(config: Any) -> Scheme:
    # Every int4 format of torchao's maps a group's smallest and largest weight to the ends of the codes. Where it keeps
    # the zero as a float offset, the integer zero of a scheme is the nearest there is: the same grid, at most half a
    # step aside, for groups that hold weights of both signs.
    return Scheme("int4", _group(config, config.group_size), "bf16", "int")


def _intx(config: Any) -> Scheme:
    element = _INTEGERS.get(str(config.weight_dtype))
    if element is None:
        raise _unequal(config, f"weight_dtype={config.weight_dtype}", ", ".join(_INTEGERS))
    asym = "-asym" if config.mapping_type.name == "ASYMMETRIC" else ""
    scheme = Scheme.parse(f"{element}-{_block(config)}{asym}")
    if config.scale_dtype is None:
        return scheme
    for name, dtype in SCALE_DTYPES.items():
        if dtype == config.scale_dtype:
            return replace(scheme, scale=name)
    raise _unequal(config, f"scale_dtype={config.scale_dtype}", ", ".join(map(str, SCALE_DTYPES.values())))


def _float8(config: Any) -> Scheme:
    if config.weight_dtype != torch.float8_e4m3fn:
        raise _unequal(config, f"weight_dtype={config.weight_dtype}", str(torch.float8_e4m3fn))
    return Scheme("fp8", _block(config), "fp32")


def _block(config: Any) -> Block:
    """Which weights of `[N, K]` share a scale under a config's granularity."""
    granularity = config.granularity
    match type(granularity).__name__:
        case "PerTensor":
            return TENSOR
        case "PerRow" if granularity.dim in (-1, 1):
            return ROW
        case "PerAxis" if granularity.axis == 0:
            return ROW
        case "PerGroup":
            return _group(config, granularity.group_size)
    raise _unequal(config, f"granularity={granularity}", "PerTensor(), PerRow(), PerAxis(0), PerGroup(size)")


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
    }
)
