"""Against the libraries that define the rules: bitsandbytes, torchao, and torch's own float8 casts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bits import unpack
from fxquant.codecs import dequantize, quantize
from fxquant.scheme import DOUBLE_QUANT_BLOCK, SCALE_DTYPES, Block, Scheme

bnb = pytest.importorskip("bitsandbytes.functional")
ao = pytest.importorskip("torchao.quantization.quant_primitives")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAGNITUDES = [1e-38, 1e-30, 1e-3, 1.0, 1e3, 1e30]
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 70)


def make(seed: int, n: int, k: int, dtype: torch.dtype, magnitude: float, kind: str) -> torch.Tensor:
    """A weight of a kind that has broken somebody's quantizer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    if kind == "zero rows":
        weight[:: max(n // 3, 1)] = 0
    elif kind == "zero end":
        weight.view(-1)[-min(n * k, 40) :] = 0
    elif kind == "constant":
        weight[:] = weight[0, 0]
    elif kind == "one sign":
        weight.abs_()
    elif kind == "steps":
        weight = (weight * 4).round() / 4
    elif kind == "outliers":
        weight.view(-1)[::37] *= 100
    if dtype == torch.float16:
        magnitude = min(max(magnitude, 1e-7), 1e2)
    return (weight * magnitude).to(dtype)


kinds = st.sampled_from(["normal", "zero rows", "zero end", "constant", "one sign", "steps", "outliers"])


def nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """bitsandbytes' codes, flat: its first element is the high nibble."""
    packed = packed.view(torch.uint8).flatten()
    return torch.stack((packed >> 4, packed & 15), -1).flatten()[:count]


@settings(max_examples=150, deadline=None)
@given(
    seeds, sizes, st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from(MAGNITUDES), kinds,
    st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128, 512]), st.booleans(),
)  # fmt: skip
def test_tables_are_bitsandbytes(seed, n, k, dtype, magnitude, kind, element, size, double):
    weight = make(seed, n, k, dtype, magnitude, kind)
    packed, state = bnb.quantize_4bit(weight, blocksize=size, quant_type=element, compress_statistics=double)
    planes = quantize(weight, Scheme(element, Block(1, size, flat=True), "fp32", double=double), "absmax")
    assert torch.equal(unpack(planes["codes"], 4, k).flatten(), nibbles(packed, n * k))
    assert torch.equal(planes["scales"], state.absmax)
    if double:
        assert state.state2.blocksize == DOUBLE_QUANT_BLOCK
        assert torch.equal(planes["scale_scales"], state.state2.absmax)
        assert torch.equal(planes["scale_offset"], state.offset.view(1))
