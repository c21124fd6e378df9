"""bitsandbytes: nf4 and fp4 with and without double quantization, and LLM.int8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.bits import pack, unpack
from fxquant.checkpoints.packing import octets, swap_nibbles
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div
from fxquant.codecs.double import dynamic_map
from fxquant.scheme import DOUBLE_QUANT_BLOCK, ELEMENTS, ROW, Activation, Block, table_name

_STATE = "weight.quant_state.bitsandbytes__"
_LONGEST_STATE = 1 << 16
_MOST_BLOCK = 1 << 16


def planes_of_bnb4(tensors: Mapping[str, Tensor], n: int, k: int) -> Planes:
    """The planes of a 4-bit linear of bitsandbytes (QLoRA, arXiv 2305.14314, in the layout of bitsandbytes 0.50).

    Blocks run over the flattened weight, and the first of two codes is the high half of a byte.

    Args:
        tensors: `weight`, of any dtype with the bytes of N * K / 2; `weight.absmax` float32, or uint8 under double
            quantization, then with `weight.nested_absmax` and `weight.nested_quant_map` float32 `[256]`;
            `weight.quant_map` float32 `[16]`; `weight.quant_state.bitsandbytes__nf4` or `..__fp4`, JSON as uint8.
        n: output features.
        k: input features.

    Returns:
        `nf4`, `fp4` or a table of the values in the file; `-dq` where the 8-bit map is that of bitsandbytes, and
        otherwise the scales that the file's map gives, in float32.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("bitsandbytes 4-bit", tensors, n, k)
    state = _state(source)
    source.require(state.get("shape") == [n, k], f"its quant_state says shape {state.get('shape')}")
    size = state.get("blocksize")
    source.require(isinstance(size, int) and 1 <= size <= _MOST_BLOCK, f"its quant_state says blocksize {size!r}")
    assert isinstance(size, int)
    blocks = ceil_div(n * k, size)
    stored = source.take("weight", (torch.uint8, torch.int8, *FLOATS))
    packed = octets(stored.view(-1))
    source.require(len(packed) == ceil_div(n * k, 2), f"'weight' has {len(packed)} bytes for {n * k} codes")
    table = source.take("weight.quant_map", torch.float32, (16,))
    planes = {"codes": _codes(packed, n, k), **_scales(source, state, blocks)}
    double = "scale_offset" in planes
    scheme = source.scheme(element=_element(source, table), block=Block(1, size, True), scale="fp32", double=double)
    return source.finish(scheme, planes)


def planes_of_bnb8(tensors: Mapping[str, Tensor], n: int, k: int, *, threshold: float | None = None) -> Planes:
    """The planes of an 8-bit linear of bitsandbytes (LLM.int8, arXiv 2208.07339).

    Args:
        tensors: `weight` int8 `[N, K]`; `SCB` float32 `[N]`, the largest magnitudes of the rows; `weight_format`, if
            there, 0.
        n: output features.
        k: input features.
        threshold: from which magnitude on a feature of the input is an outlier; 0: there are none; None: the input is
            not quantized.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("bitsandbytes 8-bit", tensors, n, k)
    codes = source.take("weight", torch.int8, (n, k))
    scales = source.take("SCB", torch.float32, (n,), (n, 1), (1, n)).view(n, 1) / 127
    if "weight_format" in tensors:
        layout = source.take("weight_format", torch.uint8, (), (1,))
        source.require(not layout.any(), f"its weight_format is {layout.tolist()}; only 0, row by row, can be read")
    activation = None if threshold is None else Activation("int8", threshold=threshold)
    scheme = source.scheme(element="int8", block=ROW, scale="fp32")
    return source.finish(scheme, {"codes": codes, "scales": scales}, activation)


def _state(source: Source) -> dict[str, Any]:
    names = [name for name in source.tensors if name.startswith(_STATE)]
    source.require(len(names) == 1, f"it has {len(names)} tensors {_STATE}...")
    text = source.take(names[0], torch.uint8)
    source.require(text.ndim == 1 and text.numel() <= _LONGEST_STATE, "its quant_state is not a short text")
    try:
        state = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError):
        raise source.error("its quant_state is not JSON") from None
    source.require(isinstance(state, dict), "its quant_state is not a JSON object")
    assert isinstance(state, dict)
    return state


def _codes(packed: Tensor, n: int, k: int) -> Tensor:
    swapped = swap_nibbles(packed)
    return swapped.view(n, k // 2) if k % 2 == 0 else pack(unpack(swapped, 4, n * k).view(n, k), 4)


def _element(source: Source, table: Tensor) -> str:
    for name in ("nf4", "fp4"):
        if torch.equal(table.cpu(), torch.tensor(ELEMENTS[name].values, dtype=torch.float32)):
            return name
    source.require(bool(table.isfinite().all()), "its 'weight.quant_map' is not finite")
    return table_name(tuple(table.tolist()))


def _scales(source: Source, state: dict[str, Any], blocks: int) -> dict[str, Tensor]:
    if "nested_blocksize" not in state:
        return {"scales": source.take("weight.absmax", torch.float32, (blocks,))}
    size, offset = state["nested_blocksize"], state.get("nested_offset")
    source.require(size == DOUBLE_QUANT_BLOCK, f"its quant_state says nested_blocksize {size!r}")
    limit = torch.finfo(torch.float32).max
    finite = isinstance(offset, (int, float)) and -limit < offset < limit
    source.require(finite, f"its quant_state says nested_offset {offset!r}")
    codes = source.take("weight.absmax", torch.uint8, (blocks,))
    outer = source.take("weight.nested_absmax", torch.float32, (ceil_div(blocks, DOUBLE_QUANT_BLOCK),))
    values = source.take("weight.nested_quant_map", torch.float32, (256,))
    offsets = torch.tensor([offset], dtype=torch.float32, device=codes.device)
    if torch.equal(values.cpu(), dynamic_map()):
        return {"scales": codes, "scale_scales": outer, "scale_offset": offsets}
    spread = outer.repeat_interleave(DOUBLE_QUANT_BLOCK)[:blocks]
    return {"scales": values[codes.to(torch.int64)] * spread + offsets}
