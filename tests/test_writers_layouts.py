"""Tensors in the formats of others are read back to the same weights, for every scheme that a format holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_planes import random_planes
from torch import Tensor
from written_checkpoints import bits

from fxquant.checkpoints import integer_parts
from fxquant.checkpoints.awq import awq_obstacles, planes_of_awq, tensors_of_awq
from fxquant.checkpoints.bitsandbytes import planes_of_bnb4, planes_of_bnb8
from fxquant.checkpoints.bitsandbytes_tensors import bnb4_obstacles, bnb8_obstacles, tensors_of_bnb4, tensors_of_bnb8
from fxquant.checkpoints.compressed_tensors import planes_of_compressed_tensors
from fxquant.checkpoints.compressed_tensors_layouts import compressed_tensors_obstacles, layout_of
from fxquant.checkpoints.compressed_tensors_tensors import tensors_of_compressed_tensors
from fxquant.checkpoints.gpt_oss import gpt_oss_obstacles, planes_of_gpt_oss, tensors_of_gpt_oss
from fxquant.checkpoints.gptq import WRITTEN_BITS, gptq_obstacles, planes_of_gptq, tensors_of_gptq
from fxquant.checkpoints.integer_parts import held_bits
from fxquant.checkpoints.source import Planes
from fxquant.checkpoints.target import group_of
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError
from fxquant.scheme import Scheme
from fxquant.writers.units import specs_of

SIZES = [(64, 128), (32, 96), (32, 32), (40, 64), (96, 160), (33, 48), (7, 33)]
INTEGERS = ["int2", "int3", "int4", "int5", "int6", "int8", "uint2", "uint3", "uint4", "uint5", "uint6", "uint8"]
ELEMENTS = [*INTEGERS, "ternary", "trit", "fp8", "nf4", "fp4", "e2m1", "e2m3"]
BLOCKS = ["row", "tensor", "g32", "g16", "g64", "b8x32", "b16x16", "b4x0", "flat32", "flat64", "b128x128"]
SCALES = ["fp16", "bf16", "fp32", "e8m0", "e4m3", "e4m3*fp32"]


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Of all kinds, most of which some format holds."""
    if draw(st.integers(0, 3)) == 0:
        return Scheme.parse(draw(st.sampled_from(["mxfp4", "mxfp6", "mxfp8", "nvfp4", "nf4-dq", "fp4-dq", "q4_k"])))
    element, block = draw(st.sampled_from(ELEMENTS)), draw(st.sampled_from(BLOCKS))
    zero = draw(st.sampled_from(["", "-asym"])) if element in INTEGERS else ""
    columns = draw(st.sampled_from(["", "", "-perm"]))
    inputs = draw(st.sampled_from(["", "", "+int8", "+fp8", "+int8-static", "+fp8-g16", "+int8-outlier6"]))
    scale = draw(st.sampled_from(SCALES[: 4 if zero else None]))
    return Scheme.parse(f"{element}-{block}{zero}-{scale}{columns}{inputs}")


def read_gptq(tensors: Mapping[str, Tensor], n: int, k: int, scheme: Scheme) -> Planes:
    settings = {"bits": held_bits(scheme.spec, WRITTEN_BITS), "group_size": k // tensors["scales"].shape[0]}
    return planes_of_gptq(tensors, n, k, checkpoint_format="gptq_v2", **settings)


def read_awq(tensors: Mapping[str, Tensor], n: int, k: int, scheme: Scheme) -> Planes:
    return planes_of_awq(tensors, n, k, group_size=k // tensors["scales"].shape[0])


def read_compressed_tensors(tensors: Mapping[str, Tensor], n: int, k: int, scheme: Scheme) -> Planes:
    layout = layout_of(scheme, n, k)
    return planes_of_compressed_tensors(
        tensors,
        n,
        k,
        format=layout.format,
        bits=layout.bits,
        group_size=layout.group_size,
        block_structure=layout.block,
        activation=scheme.activation,
    )


def read_bnb8(tensors: Mapping[str, Tensor], n: int, k: int, scheme: Scheme) -> Planes:
    return planes_of_bnb8(tensors, n, k, threshold=threshold_of(scheme))


def threshold_of(scheme: Scheme) -> float | None:
    return None if scheme.activation is None else scheme.activation.threshold


def awq_obstacles_of(scheme: Scheme, n: int, k: int) -> list[str]:
    return awq_obstacles(scheme, n, k, group_size=group_of(scheme, n, k) or k)


def bnb8_obstacles_of(scheme: Scheme, n: int, k: int) -> list[str]:
    return bnb8_obstacles(scheme, n, k, threshold=threshold_of(scheme))


FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Planes]]] = {
    "gptq": (gptq_obstacles, tensors_of_gptq, read_gptq),
    "awq": (awq_obstacles_of, tensors_of_awq, read_awq),
    "compressed-tensors": (compressed_tensors_obstacles, tensors_of_compressed_tensors, read_compressed_tensors),
    "bnb4": (bnb4_obstacles, tensors_of_bnb4, lambda tensors, n, k, _: planes_of_bnb4(tensors, n, k)),
    "bnb8": (bnb8_obstacles_of, tensors_of_bnb8, read_bnb8),
    "gpt-oss": (gpt_oss_obstacles, tensors_of_gpt_oss, lambda tensors, n, k, _: planes_of_gpt_oss(tensors, n, k)),
}


def holds(format: str, scheme: Scheme, n: int, k: int) -> bool:
    return scheme.misfit(n, k) is None and not FORMATS[format][0](scheme, n, k)


def check(format: str, scheme: Scheme, n: int, k: int, seed: int) -> None:
    _, write, read = FORMATS[format]
    planes = random_planes(scheme, n, k, seed)
    tensors = write(scheme, planes, n, k)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs_of(write, scheme, n, k).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found, again = read(tensors, n, k, scheme)
    before, after = dequantize(planes, scheme, n, k), dequantize(again, found, n, k)
    # These store the inverse of a scale.
    error = 2.0**-22 if format == "bnb8" or scheme == Scheme.parse("nvfp4") else 0.0
    assert torch.all((before - after).abs() <= error * before.abs()), scheme
    assert found.activation == scheme.activation
    if found.zero == scheme.zero:  # elsewhere, all zeros were in the middle
        second = write(found, again, n, k)
        assert second.keys() == tensors.keys()
        assert all(torch.equal(bits(t), bits(second[name])) for name, t in tensors.items() if name != "SCB")


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(scheme=schemes(), size=st.sampled_from(SIZES), seed=st.integers(0, 99))
def test_what_is_held_is_read_back(format: str, scheme: Scheme, size: tuple[int, int], seed: int) -> None:
    if holds(format, scheme, *size):
        check(format, scheme, *size, seed)
    elif scheme.misfit(*size) is None:
        with pytest.raises(CheckpointError, match="for the format has"):
            FORMATS[format][1](scheme, random_planes(scheme, *size), *size)


HELD = {
    "gptq": "int2-g32-fp16 int3-g32-fp16 int4-g64-fp16 uint4-g16-fp16 int4-g32-asym-fp16-perm int8-row-fp16 "
    "uint8-row-fp16 int3-g64-fp16-perm int5-g32-fp16 int6-row-fp16 trit-g64-fp16 ternary-tensor-fp16 int4-b8x32-fp16 "
    "int4-flat64-fp16",
    "awq": "int4-g32-fp16 uint4-g64-fp16 int4-row-fp16 uint3-g32-fp16 int2-b8x32-fp16 ternary-tensor-fp16",
    "compressed-tensors": "int2-g32 int3-g32 int4-g32-fp32 int5-g16-fp16 int6-row int8-row int8-tensor uint4-g32 "
    "uint3-row uint8-perm int4-perm int8+int8 int8-tensor+int8-static int4-g32+int8 uint4-g32+fp8 fp8 fp8+fp8 "
    "fp8-tensor fp8-tensor+fp8-static fp8-b16x16-fp32 fp8-b128x128-e8m0 fp8-b16x16+fp8-g16 fp8-g32 mxfp4 mxfp6 mxfp8 "
    "nvfp4 int4-g32-e8m0 fp8-b4x0 fp8-flat32",
    "bnb4": "nf4 fp4 nf4-dq fp4-dq nf4-flat32 fp4-flat4096 nf4-g32 fp4-g64-fp16 nf4-flat128-dq",
    "bnb8": "int8 llm-int8 int8+int8 int8-tensor-fp16 int4-row-fp16 ternary-tensor",
    "gpt-oss": "mxfp4",
}


@pytest.mark.parametrize(("format", "name"), [(format, name) for format in HELD for name in HELD[format].split()])
def test_is_held(format: str, name: str) -> None:
    scheme = Scheme.parse(name)
    assert holds(format, scheme, 64, 128)
    for seed, (n, k) in enumerate([(64, 128), (32, 96), (40, 64), (17, 33), (3, 32)]):
        if holds(format, scheme, n, k):
            check(format, scheme, n, k, seed)


SAME = {
    "gptq": "int4-g64-fp16 uint4-g32-fp16 int8-fp16 uint8-fp16 int3-g32-fp16 int2-g32-fp16",
    "awq": "int4-g64-fp16 uint4-g32-fp16 int4-row-fp16",
    "compressed-tensors": "int4-g64 int3-g32 uint4-g32 uint6-g32-fp16 int5-row int8+int8 int8-tensor+int8-static fp8 "
    "fp8+fp8 fp8-b16x16-fp32 mxfp4 mxfp6 mxfp8 uint8+int8",
    "bnb4": "nf4 fp4 nf4-dq fp4-flat128-dq",
    "gpt-oss": "mxfp4",
}


@pytest.mark.parametrize(("format", "name"), [(format, name) for format in SAME for name in SAME[format].split()])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (32, 384)])
def test_planes_are_the_same(format: str, name: str, n: int, k: int) -> None:
    scheme = Scheme.parse(name)
    _, write, read = FORMATS[format]
    planes = random_planes(scheme, n, k)
    if scheme.zero == "int":
        planes["zeros"] = unused_bits_cleared(scheme, planes["zeros"], n, k)
    found, again = read(write(scheme, planes, n, k), n, k, scheme)
    assert found == scheme
    assert all(torch.equal(bits(plane), bits(again[name])) for name, plane in planes.items())


def unused_bits_cleared(scheme: Scheme, zeros: Tensor, n: int, k: int) -> Tensor:
    from fxquant.bits import pack, unpack

    columns = scheme.block.grid(n, k)[1]
    return zeros if scheme.spec.dtype else pack(unpack(zeros, scheme.spec.bits, columns), scheme.spec.bits)


def test_act_order_is_that_of_the_file() -> None:
    scheme, n, k = Scheme.parse("uint4-g32-fp16-perm"), 32, 128
    planes = random_planes(scheme, n, k)
    planes["perm"] = torch.cat([part.sort().values for part in planes["perm"].split(32)])
    _, write, read = FORMATS["gptq"]
    found, again = read(write(scheme, planes, n, k), n, k, scheme)
    assert found == scheme
    assert all(torch.equal(plane, again[name]) for name, plane in planes.items())


@pytest.mark.parametrize("name", ["uint4-g32-fp16", "int3-g32-fp16"])
def test_pieces_make_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, n, k = Scheme.parse(name), 96, 64
    planes = random_planes(scheme, n, k)
    for format in ("gptq", "awq", "compressed-tensors"):
        _, write, _ = FORMATS[format]
        whole = write(scheme, planes, n, k)
        with monkeypatch.context() as patch:
            patch.setattr(integer_parts, "_PIECE", 20 * k)
            pieces = write(scheme, planes, n, k)
        assert all(torch.equal(tensor, pieces[key]) for key, tensor in whole.items())


def test_reciprocals_that_a_file_had_come_back() -> None:
    scheme, n, k = Scheme.parse("nvfp4"), 4, 32
    planes = random_planes(scheme, n, k)
    for value in torch.rand(300, generator=torch.Generator().manual_seed(1)) * 1e4:
        planes["scale_scales"] = value.reciprocal().view(1, 1)
        tensors = tensors_of_compressed_tensors(scheme, planes, n, k)
        again = read_compressed_tensors(tensors, n, k, scheme)[1]
        assert torch.equal(again["scale_scales"], planes["scale_scales"])


def test_row_maxima_that_a_file_had_come_back() -> None:
    scheme, n, k = Scheme.parse("llm-int8"), 2000, 4
    planes = random_planes(scheme, n, k)
    planes["scales"] = torch.rand(n, 1, generator=torch.Generator().manual_seed(1)) / 127
    again = read_bnb8(tensors_of_bnb8(scheme, planes, n, k), n, k, scheme)[1]
    assert torch.equal(again["scales"], planes["scales"])


@pytest.mark.parametrize("format", FORMATS)
def test_planes_of_another_weight_are_refused(format: str) -> None:
    scheme = Scheme.parse(HELD[format].split()[0])
    write = functools.partial(FORMATS[format][1], scheme)
    planes = random_planes(scheme, 64, 128)
    with pytest.raises(CheckpointError, match="has the planes"):
        write(planes, 32, 128)
    with pytest.raises(CheckpointError, match="has the planes"):
        write({"codes": planes["codes"]}, 64, 128)


def test_the_state_of_bitsandbytes_is_as_long_for_all_values() -> None:
    scheme, lengths = Scheme.parse("nf4-dq"), set()
    for offset in (0.0, 1.0, 1 / 3, 1.1754943508222875e-38, -3.4028232635611926e38, 1e-45):
        planes = random_planes(scheme, 8, 64) | {"scale_offset": torch.tensor([offset])}
        tensors = tensors_of_bnb4(scheme, planes, 8, 64)
        lengths.add(tensors["weight.quant_state.bitsandbytes__nf4"].shape)
        assert torch.equal(planes_of_bnb4(tensors, 8, 64)[1]["scale_offset"], planes["scale_offset"])
    assert len(lengths) == 1
