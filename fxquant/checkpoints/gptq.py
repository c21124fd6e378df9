"""GPTQ: AutoGPTQ's v1, v2 and GPTQModel's planar layout, with act-order; AutoRound's `auto_gptq` and `auto_round`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.integer_parts import held_bits, integer_obstacles, of_fields, scales_and_zeros
from fxquant.checkpoints.integers import affine, order
from fxquant.checkpoints.packing import octets, planar, stream, words
from fxquant.checkpoints.source import FLOATS, Planes, Source, ceil_div
from fxquant.checkpoints.target import Target, Written, natural
from fxquant.scheme import Scheme

FORMATS = ("gptq", "gptq_v2", "gptq_p")
WRITTEN_BITS = (2, 3, 4, 8)
"""Those that every reader of `gptq_v2` knows as a bit stream."""
_RUN = 32


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


def gptq_obstacles(scheme: Scheme, n: int, k: int) -> list[str]:
    """What keeps `gptq_v2` from holding a weight exactly: what it has instead."""
    found = integer_obstacles(scheme, n, k, WRITTEN_BITS, perm=True)
    if scheme.scale != "fp16":
        found.append(f"fp16 scales, not {scheme.scale}")
    if scheme.activation is not None:
        found.append("no quantized inputs")
    # AutoGPTQ and the kernels for its layout take whole runs of 32 alone.
    found += [
        f"weights whose {name} is a multiple of {_RUN}, not {name}={size}"
        for name, size in (("N", n), ("K", k))
        if size % _RUN
    ]
    return found


def tensors_of_gptq(scheme: Scheme, planes: Mapping[str, Tensor], n: int, k: int) -> Written:
    """The tensors of a GPTQ linear in the layout `gptq_v2`: the inverse of `planes_of_gptq`.

    A permutation of the columns becomes `g_idx`. Codes of a width that the layout does not have stand in the next
    wider ones, and blocks of several rows in groups of their own: the same weights.

    Args:
        scheme: one that `gptq_obstacles` has nothing against.
        planes: as `Scheme.planes` has them; those without storage, on the meta device, give such tensors.
        n: output features.
        k: input features.

    Returns:
        `qweight` int32 `[K * bits / 32, N]`, `qzeros` int32 `[G, ceil(N * bits / 32)]`, `scales` float16 `[G, N]`,
        `g_idx` int32 `[K]`.

    Raises:
        CheckpointError: another scheme, or planes that are not its own.
    """
    target = Target("GPTQ", scheme, planes, n, k)
    target.check(gptq_obstacles)
    bits = held_bits(scheme.spec, WRITTEN_BITS)
    scales, zeros = scales_and_zeros(target, bits)
    groups = torch.arange(k, device=scales.device) // target.group
    return {
        "qweight": of_fields(target, bits, lambda rows: words(natural(target, rows), bits)).t().contiguous(),
        "qzeros": words(zeros.t(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": natural(target, groups).to(torch.int32),
    }


def _zeros(qzeros: Tensor, bits: int, n: int, less_one: bool, by_word: bool) -> Tensor:
    """Zero points, uint8 `[G, N]`."""
    if less_one and by_word:
        words = (qzeros.to(torch.int64) & 0xFFFFFFFF) + sum(1 << i for i in range(0, 32, bits))
        # What is carried out of the 32 bits belongs to nobody.
        low = octets(words).unflatten(-1, (-1, 8))[..., :4].flatten(-2)
        return stream(low, bits, n)
    zeros = stream(qzeros, bits, n)
    return (zeros + 1) & ((1 << bits) - 1) if less_one else zeros
