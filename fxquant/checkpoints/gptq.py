"""GPTQ: AutoGPTQ's v1, v2 and GPTQModel's planar layout, with act-order; AutoRound's `auto_gptq` and `auto_round`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.integers import affine, order
from fxquant.checkpoints.packing import octets, planar, stream
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div

FORMATS = ("gptq", "gptq_v2", "gptq_p")


def planes_of_gptq(
    tensors: Mapping[str, Tensor],
    n: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    checkpoint_format: str = "gptq",
    by_gptqmodel: bool = False,
) -> Planes:
    """The planes of a GPTQ linear (arXiv 2210.17323, in the layout of AutoGPTQ and GPTQModel).

    Args:
        tensors: `qweight` int32 `[ceil(K * bits / 32), N]`, `qzeros` int32 `[G, ceil(N * bits / 32)]`, `scales`
            `[G, N]`, and `g_idx` int32 `[K]` unless groups stand in order.
        n: output features.
        k: input features.
        bits: 2 to 8.
        group_size: columns that share a scale; -1: all.
        checkpoint_format: `gptq` stores zero points less one, `gptq_v2` as they are (as AutoRound's packing
            `auto_round` does), `gptq_p` as well, with codes in planes of bits.
        by_gptqmodel: whether GPTQModel wrote the file. It subtracts the one from whole words of a `gptq` file, so
            that a zero point of 0 borrows from the next one.

    Returns:
        The scheme and its planes: with act-order, columns are permuted so that groups are contiguous.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("GPTQ", tensors, n, k)
    source.require(checkpoint_format in FORMATS, f"checkpoint format {checkpoint_format!r} is none of {FORMATS}")
    known = (3, 5, 6, 7) if checkpoint_format == "gptq_p" else tuple(range(2, 9))
    source.require(bits in known, f"{checkpoint_format} has no codes of {bits} bits")
    group = source.group(group_size)
    qweight = source.take("qweight", torch.int32, (ceil_div(k * bits, 32), n))
    scales = source.take("scales", FLOATS, (k // group, n))
    qzeros = source.take("qzeros", torch.int32, (k // group, ceil_div(n * bits, 32)))
    perm = order(source, source.take("g_idx", torch.int32, (k,)), group) if "g_idx" in tensors else None
    if checkpoint_format == "gptq_p":
        source.require(n % 32 == k % 32 == 0, "planes of bits hold multiples of 32 codes")
        fields, zeros = planar(qweight.t(), bits), planar(qzeros, bits)
    else:
        fields = stream(qweight.t(), bits, k)
        zeros = _zeros(qzeros, bits, n, checkpoint_format == "gptq", by_gptqmodel and 32 % bits == 0)
    if perm is not None:
        fields = fields.index_select(1, perm)
    return affine(source, fields, bits, scales.t(), zeros.t(), source.block(group), perm)


def _zeros(qzeros: Tensor, bits: int, n: int, less_one: bool, by_word: bool) -> Tensor:
    """Zero points, uint8 `[G, N]`."""
    if less_one and by_word:
        words = (qzeros.to(torch.int64) & 0xFFFFFFFF) + sum(1 << i for i in range(0, 32, bits))
        # What is carried out of the 32 bits belongs to nobody.
        low = octets(words).unflatten(-1, (-1, 8))[..., :4].flatten(-2)
        return stream(low, bits, n)
    zeros = stream(qzeros, bits, n)
    return (zeros + 1) & ((1 << bits) - 1) if less_one else zeros
