"""Codes, scales and zeros are bit for bit what compressed-tensors makes: its own functions and compressors."""

from __future__ import annotations

import pytest
import torch
from awkward_weights import WEIGHTS, awkward, blocks_of, integers, quantized, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.codecs import quantize
from fxquant.scheme import SCALE_TYPES, Scheme

ct = pytest.importorskip("compressed_tensors")


def compressed(weight: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor | None]:
    """What compressed-tensors' compressor makes of a weight with the min and max of its blocks; and the zeros."""
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
        maybe_pad_tensor_for_block_quant,
    )

    name, scheme_args = str(scheme), {"num_bits": scheme.spec.bits, "type": "float", "symmetric": True}
    n, k = weight.shape
    r, c = blocks_of(scheme, n, k)
    strategy = {"tensor": "tensor", "row": "channel"}.get(str(scheme.block), "group" if r == 1 else "block")
    if scheme.spec.kind == "int":
        scheme_args |= {"type": "int", "symmetric": scheme.zero == "none"}
    if name == "nvfp4":
        strategy, scheme_args["scale_dtype"] = "tensor_group", torch.float8_e4m3fn
    if name.startswith("mx"):
        scheme_args |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    if "group" in strategy:
        scheme_args["group_size"] = c
    if strategy == "block":
        scheme_args["block_structure"] = [r, c]
    args = ct.quantization.QuantizationArgs(strategy=strategy, **scheme_args)
    padded = maybe_pad_tensor_for_block_quant(weight, (r, c))
    tiles = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
    above = generate_gparam(weight.amin(), weight.amax()) if name == "nvfp4" else None
    scale, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args, above)
    kind = SCALE_TYPES[scheme.scale]
    if kind.kind == "float" and kind.pattern is None and torch.promote_types(kind.dtype, scale.dtype) != kind.dtype:
        scale = scale.to(kind.dtype)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": above}
    kept = ct.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    form = {"nvfp4": "nvfp4-pack", "mxfp4": "mxfp4-pack", "mxfp6": "mxfp6-pack", "mxfp8": "mxfp8"}.get(name, "naive")
    compressor = ct.BaseCompressor.get_value_from_registry(f"{form}-quantized")
    return compressor.compress(state, kept), zero


INTEGERS = [f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)]
float_blocks = st.sampled_from(["row", "tensor", "g32", "g8", "b4x16", "b3x0"])


@settings(max_examples=300, deadline=None)
@given(
    *WEIGHTS, st.sampled_from([*INTEGERS, "fp8"]), float_blocks,
    st.booleans(), st.sampled_from(["fp32", "bf16", "fp16"]),
)  # fmt: skip
def test_compressed_tensors(seed, n, count, dtype, magnitude, kind, element, block, asymmetric, scales):
    spelling = f"{element}-{block}{'-asym' * (asymmetric and element != 'fp8')}-{scales}"
    scheme, k = Scheme.parse(spelling), 32 * count
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    planes = quantized(weight, scheme, "compressed-tensors")
    theirs, zero = compressed(weight, scheme)
    wanted = theirs["weight_scale"].to(SCALE_TYPES[scales].dtype)
    if planes is None or not wanted.all():
        assert planes is not None or not wanted.isfinite().all()
        return
    assert same(planes["scales"], wanted.view(planes["scales"].shape))
    if element == "fp8":
        assert same(planes["codes"], theirs["weight"].view(torch.uint8))
    else:
        assert torch.equal(integers(planes["codes"], scheme, k), theirs["weight"].long())
    if scheme.zero == "int":
        assert torch.equal(integers(planes["zeros"], scheme, wanted.shape[-1]), zero.long())


@settings(max_examples=200, deadline=None)
@given(*WEIGHTS, st.sampled_from(["nvfp4", "mxfp4", "mxfp6", "mxfp8"]))
def test_compressed_tensors_two_levels_and_mx(seed, n, count, dtype, magnitude, kind, spelling):
    scheme, k = Scheme.parse(spelling), 32 * count
    weight = awkward(seed, n, k, dtype, magnitude, kind)
    planes, (theirs, _) = quantize(weight, scheme, "compressed-tensors"), compressed(weight, scheme)
    assert same(planes["scales"], theirs["weight_scale"].view(torch.uint8))
    codes = theirs["weight_packed"] if "weight_packed" in theirs else theirs["weight"]
    assert same(planes["codes"], codes.view(torch.uint8))
    if spelling == "nvfp4":
        assert same(planes["scale_scales"], (1 / theirs["weight_global_scale"]).view(1, 1))
