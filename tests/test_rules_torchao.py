"""Codes, scales and zeros are bit for bit what torchao makes: the tensors of `from_hp`, `to_mx`, `nvfp4_quantize`."""

from __future__ import annotations

import pytest
import torch
from awkward_weights import WEIGHTS, awkward, blocks_of, integers, quantized, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bits import unpack
from fxquant.codecs import quantize
from fxquant.scheme import SCALE_TYPES, Scheme

primitives = pytest.importorskip("torchao.quantization.quant_primitives")

INTEGERS = [f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)]


@settings(max_examples=300, deadline=None)
@given(
    *WEIGHTS, st.sampled_from(INTEGERS), st.sampled_from(["row", "tensor", "g32", "g8", "b4x16", "b3x0"]),
    st.sampled_from(["SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"]), st.booleans(),
)  # fmt: skip
def test_torchao_integers(seed, n, count, dtype, magnitude, kind, element, block, mapping, wide):
    """Scales in the dtype of the weight, as the library has them, or in float32, which holds all of these."""
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

    scales = "fp32" if wide else next(name for name in ("fp32", "bf16", "fp16") if SCALE_TYPES[name].dtype == dtype)
    scheme = Scheme.parse(f"{element}-{block}{'-asym' * (mapping == 'ASYMMETRIC')}-{scales}")
    if element == "int8" and scales == "fp32":
        return  # Int8Tensor, see below
    n, k = n * (scheme.block.rows or 1), 32 * count
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    library = "torchao-no-clipping" if "CLIPPING" in mapping else "torchao"
    theirs = IntxUnpackedToInt8Tensor.from_hp(
        weight, blocks_of(scheme, n, k), getattr(torch, element), mapping_type=primitives.MappingType[mapping]
    )
    planes = quantized(weight, scheme, library)
    assert (planes is None) == (not theirs.scale.isfinite().all())
    if planes is None:
        return
    assert same(planes["scales"], theirs.scale.to(SCALE_TYPES[scales].dtype))
    assert torch.equal(integers(planes["codes"], scheme, k), theirs.qdata.long())
    if scheme.zero == "int":
        assert torch.equal(integers(planes["zeros"], scheme, theirs.zero_point.shape[1]), theirs.zero_point.long())
    else:
        assert not theirs.zero_point.any()


@settings(max_examples=150, deadline=None)
@given(
    *WEIGHTS, st.sampled_from(["row", "tensor", "g32-fp32", "g16-fp32"]),
    st.sampled_from(["SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"]),
)  # fmt: skip
def test_torchao_int8(seed, n, count, dtype, magnitude, kind, block, mapping):
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import Int8Tensor

    scheme, k = Scheme.parse(f"int8-{block}{'-asym' * (mapping == 'ASYMMETRIC')}"), 32 * count
    granularity = {"row": PerRow(), "tensor": PerTensor()}.get(block) or PerGroup(scheme.block.columns)
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    theirs = Int8Tensor.from_hp(weight, granularity, primitives.MappingType[mapping])
    planes = quantized(weight, scheme, "torchao-no-clipping" if "CLIPPING" in mapping else "torchao")
    assert (planes is None) == (not theirs.scale.isfinite().all())
    if planes is not None:
        assert same(planes["scales"], theirs.scale)
        assert same(planes["codes"], theirs.qdata)
        assert scheme.zero == "none" or same(planes["zeros"], theirs.zero_point)


@settings(max_examples=150, deadline=None)
@given(
    *WEIGHTS, st.sampled_from(["fp8", "fp8e5m2"]),
    st.sampled_from(["row", "tensor"]),
)  # fmt: skip
def test_torchao_fp8(seed, n, count, dtype, magnitude, kind, element, block):
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import Float8Tensor

    scheme, k = Scheme.parse(f"{element}-{block}"), 32 * count
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    theirs = Float8Tensor.from_hp(weight, scheme.spec.float_dtype, PerRow() if block == "row" else PerTensor())
    planes = quantize(weight, scheme, "torchao")
    assert same(planes["scales"], theirs.scale)
    undefined = theirs.qdata.float().isnan()
    assert not ((theirs.scale != 0) & undefined).any()
    codes = theirs.qdata.view(torch.uint8).masked_fill(undefined, 0)
    assert same(planes["codes"], codes)


MX = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6": "fp6_e2m3",
    "mxfp6e3m2": "fp6_e3m2",
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8e5m2": torch.float8_e5m2,
}


@settings(max_examples=200, deadline=None)
@given(*WEIGHTS, st.sampled_from(list(MX)))
def test_torchao_mx(seed, n, count, dtype, magnitude, kind, spelling):
    from torchao.prototype.mx_formats import mx_tensor

    scheme, k = Scheme.parse(spelling), 32 * count
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    given_to_them = weight.float() if dtype == torch.float16 else weight  # it takes no float16
    scale, codes = mx_tensor.to_mx(given_to_them, MX[spelling], 32)
    planes = quantize(weight, scheme, "torchao")
    assert same(planes["scales"], scale.view(torch.uint8))
    ours = unpack(planes["codes"], 6, k) if scheme.spec.bits == 6 else planes["codes"]
    assert same(ours, codes.view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(*WEIGHTS, st.sampled_from(["nvfp4", "e2m1-g16-e4m3"]))
def test_torchao_nvfp4(seed, n, count, dtype, magnitude, kind, spelling):
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4

    weight = awkward(seed, n, 32 * count, dtype, magnitude, kind)
    above = nvfp4.per_tensor_amax_to_scale(weight.abs().amax()) if spelling == "nvfp4" else None
    scale, codes = nvfp4.nvfp4_quantize(weight.float() if dtype == torch.float16 else weight, 16, above)
    planes = quantize(weight, Scheme.parse(spelling), "torchao")
    if above is not None:
        assert same(planes["scale_scales"], above.view(1, 1))
    if above is not None and not (1 / above).isfinite():
        assert not planes["codes"].any() or weight.any()  # it divides by 0 and makes codes of nan
        return
    assert same(planes["scales"], scale.view(torch.uint8))
    assert same(planes["codes"], codes)
