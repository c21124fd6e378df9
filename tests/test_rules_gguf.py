"""Codes, scales and biases are bit for bit those in the blocks that gguf makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from awkward_weights import WEIGHTS, awkward, quantized, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.codecs import dequantize
from fxquant.scheme import Scheme

quants = pytest.importorskip("gguf.quants")

GGUF = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "tq1_0": 54, "tq2_0": 66, "mxfp4": 17}
"""Bytes of a block."""


@settings(max_examples=400, deadline=None)
@given(*WEIGHTS, st.sampled_from(list(GGUF)))
def test_gguf(seed, n, count, dtype, magnitude, kind, spelling):
    qtype, scheme, size = quants.GGMLQuantizationType[spelling.upper()], Scheme.parse(spelling), GGUF[spelling]
    k = scheme.block.columns * count
    weight, grid = awkward(seed, n, k, dtype, magnitude, kind), scheme.block.grid(n, k)
    with np.errstate(all="ignore"):
        blocks = torch.from_numpy(quants.quantize(weight.float().numpy(), qtype)).view(-1, size)
    planes = quantized(weight, scheme, "gguf")
    start, stop, one = (0, 1, [127]) if spelling == "mxfp4" else (0, 2, [0, 60])
    if spelling.startswith("tq"):
        start, stop = size - 2, size
    scale = blocks[:, start:stop].contiguous()
    if spelling != "mxfp4":
        scale = scale.view(torch.float16)
        bias = blocks[:, 2:4].contiguous().view(torch.float16)
        finite = scale.isfinite().all() and (spelling not in ("q4_1", "q5_1") or bias.isfinite().all())
        assert (planes is None) == (not finite)
        if planes is None:
            return
    # Near the smallest normal numbers it casts negative numbers, infinity and nan to unsigned integers.
    top = weight.float().view(-1, scheme.block.columns).abs().amax(1)
    defined = (top == 0) | (top > 1e-35)
    if spelling != "mxfp4" or defined.all():
        assert same(planes["scales"], scale.view(grid))
    if "biases" in planes:  # numpy's minimum of 0 and -0 is either
        assert torch.equal(planes["biases"], bias.view(grid))
        blocks[:, 2:4] = 0
    blocks[:, start:stop] = torch.tensor(one, dtype=torch.uint8)
    codes = torch.from_numpy(quants.dequantize(blocks.numpy(), qtype))[defined]
    assert torch.equal(unscaled(planes, scheme, n, k)[defined], codes)


def unscaled(planes: dict[str, Tensor], scheme: Scheme, n: int, k: int) -> Tensor:
    """The values of the codes, `[blocks, columns]`."""
    one = torch.full_like(planes["scales"], 127 if planes["scales"].dtype == torch.uint8 else 1)
    bare = planes | {"scales": one} | {name: torch.zeros_like(planes[name]) for name in planes.keys() & {"biases"}}
    return dequantize(bare, scheme, n, k).view(-1, scheme.block.columns)
