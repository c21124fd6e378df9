"""Planes of one scheme as planes of another: what stays, and that the error which is told is the one that was added."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.codecs import dequantize, quantize
from fxquant.recoding import is_exact, recoded
from fxquant.scheme import Scheme

SPELLINGS = [
    *("int8", "int4-g64", "int4-g64-fp16", "uint4-g64", "uint4-g64-fp16", "uint4-g64-bias-fp16", "uint4-g32-bias"),
    *("uint8-g32", "uint8-g32-bias-fp16", "int3-g64-perm", "int4-g64-asym", "nf4", "nf4-dq", "fp4", "fp8", "mxfp4"),
    *("nvfp4", "q4_k", "q6_k", "q8_0", "iq4_nl", "int8+int8", "int4-g64+int8", "fp8-b64x64"),
]


@settings(max_examples=80)
@given(st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS), st.integers(0, 1 << 30))
def test_the_error_is_the_one_that_is_told(one: str, other: str, seed: int) -> None:
    n, k = 64, 256
    scheme, to = Scheme.parse(one), Scheme.parse(other)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    planes = quantize(weight, scheme)
    made, error = recoded(planes, scheme, to, n, k)
    assert {name: (spec.shape, spec.dtype) for name, spec in to.planes(n, k).items()} == {
        name: (tuple(plane.shape), plane.dtype) for name, plane in made.items()
    }
    before, after = (dequantize(p, s, n, k).double() for p, s in ((planes, scheme), (made, to)))
    if error is None:
        assert torch.equal(before, after)
    else:
        assert float((after - before).square().sum() / before.square().sum()) == pytest.approx(error, rel=1e-4)
    if is_exact(scheme, to):
        assert error is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int4-g64", "int4-g64-fp16"),
        ("int8+int8", "int8-fp16"),
        ("uint4-g64", "uint4-g64-bias-fp16"),
        ("uint8-g32", "uint8-g32-bias-fp16"),
        ("uint3-g64-perm", "uint3-g64-bias-fp16-perm"),
    ],
)
def test_codes_stay_where_only_scales_change(one: str, other: str) -> None:
    n, k = 96, 192
    scheme, to = Scheme.parse(one), Scheme.parse(other)
    planes = quantize(torch.randn(n, k), scheme)
    made, error = recoded(planes, scheme, to, n, k)
    assert torch.equal(made["codes"], planes["codes"])
    assert (error or 0.0) < 1e-5


def test_scales_that_the_other_dtype_cannot_hold() -> None:
    """fp16 ends at 65504 and below 6e-8: the weight is quantized again, as well as that is possible."""
    scheme, to = Scheme.parse("int4-g64"), Scheme.parse("int4-g64-fp16")
    for size in (1e-8, 1e6):
        planes = quantize(torch.randn(8, 128) * size, scheme)
        made, error = recoded(planes, scheme, to, 8, 128)
        assert error is not None
        assert torch.isfinite(dequantize(made, to, 8, 128)).all()
