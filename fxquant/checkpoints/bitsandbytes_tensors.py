"""What bitsandbytes stores of a linear, out of planes: the inverse of `bitsandbytes`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.bits import pack, unpack
from fxquant.checkpoints.integer_parts import integer_obstacles, of_fields
from fxquant.checkpoints.packing import swap_nibbles
from fxquant.checkpoints.target import EXACT_IN_FP32, Target, Written, argument_of, group_of
from fxquant.codecs.double import dynamic_map
from fxquant.scheme import DOUBLE_QUANT_BLOCK, Activation, Scheme

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those that kernels of bitsandbytes know."""
_FLOAT_DIGITS = 32
"""Characters that a float takes in JSON, at most."""


def bnb4_obstacles(scheme: Scheme, n: int, k: int) -> list[str]:
    """What keeps 4-bit linears of bitsandbytes from holding a weight exactly: what they have instead."""
    found = [] if scheme.element in ("nf4", "fp4") else [f"nf4 or fp4 codes, not {scheme.element}"]
    size = scheme.block.columns if scheme.block.flat else group_of(scheme, n, k)
    if (not scheme.block.flat and scheme.block.rows != 1) or size not in BLOCK_SIZES:
        found.append(f"blocks of 32, 64, 128 and so on to {BLOCK_SIZES[-1]} weights in a row, not {scheme.block}")
    if scheme.outer is not None or scheme.scale not in EXACT_IN_FP32:
        found.append(f"fp32 scales or 8-bit codes, not {scheme.scale}")
    if scheme.columns:
        found.append("no columns that are permuted, scaled or shifted")
    if scheme.activation is not None:
        found.append("no quantized inputs")
    return found


def tensors_of_bnb4(
    scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int, *, dtype: torch.dtype = torch.bfloat16
) -> Written:
    """The tensors of a 4-bit linear of bitsandbytes: the inverse of `planes_of_bnb4`.

    Args:
        scheme: one that `bnb4_obstacles` has nothing against.
        planes: as `Scheme.planes` has them; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.
        dtype: in which the weight is multiplied.

    Returns:
        `weight` uint8 `[ceil(N * K / 2), 1]`; `weight.absmax` float32, or uint8 under double quantization, then with
        `weight.nested_absmax` and `weight.nested_quant_map`; `weight.quant_map` float32 `[16]`;
        `weight.quant_state.bitsandbytes__nf4` or `..__fp4`, JSON as uint8, as long for all values.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    target = Target("bitsandbytes 4-bit", scheme, planes, n, k)
    target.check(bnb4_obstacles)
    codes, scales = planes["codes"], planes["scales"]
    joined = codes.flatten() if k % 2 == 0 else pack(unpack(codes, 4, k).flatten(), 4)
    state = {
        "quant_type": scheme.element,
        "blocksize": scheme.block.columns if scheme.block.flat else target.group,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [n, k],
    }
    written = {
        "weight": swap_nibbles(joined).unsqueeze(1),
        "weight.absmax": scales if scheme.double else _absmax(target),
        "weight.quant_map": torch.tensor(scheme.spec.values, dtype=torch.float32, device=codes.device),
    }
    if scheme.double:
        offset = planes["scale_offset"]
        state |= {"nested_blocksize": DOUBLE_QUANT_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = 0.0 if offset.is_meta else offset.item()
        written["weight.nested_absmax"] = planes["scale_scales"]
        written["weight.nested_quant_map"] = dynamic_map().to(codes.device)
    written[f"weight.quant_state.bitsandbytes__{scheme.element}"] = _text(state).to(codes.device)
    return written


def bnb8_obstacles(scheme: Scheme, n: int, k: int, *, threshold: float | None = None) -> list[str]:
    """What keeps 8-bit linears of bitsandbytes from holding a weight exactly: what they have instead.

    Args:
        scheme: of the weight.
        n: output features.
        k: input features.
        threshold: as in `planes_of_bnb8`.
    """
    found = integer_obstacles(scheme, n, k, (8,))
    if scheme.zero == "int":
        found.append("no zero points")
    group = group_of(scheme, n, k)
    if group is not None and group != k:
        found.append(f"one scale for each row, not for each {scheme.block}")
    if scheme.scale not in EXACT_IN_FP32:
        found.append(f"fp32 scales, not {scheme.scale}")
    activation = None if threshold is None else Activation("int8", threshold=threshold)
    if scheme.activation != activation:
        found.append(f"inputs that are {activation or 'not quantized'}, not {scheme.activation or 'as they are'}")
    return found


def tensors_of_bnb8(scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int) -> Written:
    """The tensors of an 8-bit linear of bitsandbytes: the inverse of `planes_of_bnb8`.

    Scales are stored times 127. Where no float32 gives a scale back, the next one is written.

    Args:
        scheme: one that `bnb8_obstacles` has nothing against.
        planes: as `Scheme.planes` has them; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.

    Returns:
        `weight` int8 `[N, K]`, `SCB` float32 `[N]`, `weight_format` uint8, 0.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    target = Target("bitsandbytes 8-bit", scheme, planes, n, k)
    threshold = None if scheme.activation is None else scheme.activation.threshold
    target.check(functools.partial(bnb8_obstacles, threshold=threshold))
    scales = target.scales().to(torch.float32)
    return {
        "weight": of_fields(target, 8, lambda rows: (rows.to(torch.int16) - 128).to(torch.int8)),
        "SCB": argument_of(scales, lambda largest: largest / 127, scales * 127).view(n),
        "weight_format": torch.zeros((), dtype=torch.uint8, device=scales.device),
    }


def _absmax(target: Target) -> Tensor:
    """Scales of blocks of the flattened weight, float32."""
    if target.scheme.block.flat:
        return target.planes["scales"].to(torch.float32)
    return target.scales().to(torch.float32).flatten()


def _text(state: Mapping[str, object]) -> Tensor:
    """JSON as bytes, filled up with blanks to a length that does not depend on the values of floats."""
    longest = json.dumps({**state, **{name: 0 for name, value in state.items() if isinstance(value, float)}})
    size = len(longest) + (_FLOAT_DIGITS if "nested_offset" in state else 0)
    return torch.tensor(list(json.dumps(state).ljust(size).encode()), dtype=torch.uint8)
