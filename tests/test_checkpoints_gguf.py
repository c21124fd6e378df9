"""GGUF's blocks to planes and back: against gguf-py, and formulas for what it does not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.checkpoints import GGUF_GRIDS, GGUF_LAYOUTS, gguf_of_planes, planes_of_gguf
from fxquant.codecs import dequantize, quantize
from fxquant.errors import CheckpointError
from fxquant.scheme import Scheme

quants = pytest.importorskip("gguf.quants")
TYPES = [*GGUF_LAYOUTS, *GGUF_GRIDS]
UNKNOWN_TO_GGUF = {"Q1_0", "Q2_0"}


def sizes(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return (
        (GGUF_LAYOUTS[name].size, GGUF_LAYOUTS[name].nbytes) if name in GGUF_LAYOUTS else (256, GGUF_GRIDS[name].nbytes)
    )


def random_blocks(name: str, n: int, count: int, seed: int = 0) -> Tensor:
    """Any bytes that a producer can write: halves are finite, digits in base 3 are digits, scales are numbers."""
    rng = np.random.default_rng(seed)
    _, nbytes = sizes(name)
    blocks = rng.integers(0, 256, (n, count, nbytes), dtype=np.uint8)
    halves = GGUF_LAYOUTS[name].halves.values() if name in GGUF_LAYOUTS else (0,)
    for at in halves if name != "IQ1_M" else ():
        d = (rng.standard_normal((n, count, 1)) * 10.0 ** rng.integers(-7, 2, (n, count, 1))).astype(np.float16)
        blocks[..., at : at + 2] = d.view(np.uint8)
    if name == "IQ1_M":  # the exponent's lowest bits are in the highest nibble of the last but one byte
        blocks[..., 55] &= 0x3F
    if name == "TQ1_0":
        blocks[..., :48] = (rng.integers(0, 243, (n, count, 48)) * 256 + 242) // 243
        blocks[..., 48:52] = (rng.integers(0, 81, (n, count, 4)) * 3 * 256 + 242) // 243
    if name == "NVFP4":
        blocks[..., :4] %= 127
    if name == "MXFP4":
        blocks[..., 0] %= 250
    return torch.from_numpy(blocks).flatten(1)


def reference(blocks: Tensor, name: str) -> Tensor:
    from gguf import GGMLQuantizationType

    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]).copy())


@pytest.mark.parametrize("name", [name for name in TYPES if name not in UNKNOWN_TO_GGUF])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (5, 3)])
def test_decodes_as_gguf(name: str, n: int, count: int) -> None:
    blocks, k = random_blocks(name, n, count), count * sizes(name)[0]
    scheme, planes = planes_of_gguf(blocks, name, n, k)
    assert str(scheme) == name.lower()
    assert torch.equal(dequantize(planes, scheme, n, k), reference(blocks, name))


@pytest.mark.parametrize("name", sorted(UNKNOWN_TO_GGUF))
def test_decodes_as_the_formula(name: str) -> None:
    n, (size, nbytes) = 3, sizes(name)
    blocks = random_blocks(name, n, 2)
    scheme, planes = planes_of_gguf(blocks, name, n, 2 * size)
    expected = torch.empty(n, 2, size)
    bits = 8 * (nbytes - 2) // size
    for row, block in np.ndindex(n, 2):
        octets = blocks[row, block * nbytes : (block + 1) * nbytes].numpy().tobytes()
        d, word = float(np.frombuffer(octets[:2], np.float16)[0]), int.from_bytes(octets[2:], "little")
        codes = [word >> (bits * i) & ((1 << bits) - 1) for i in range(size)]
        expected[row, block] = torch.tensor([d * (2 * code - 1 if bits == 1 else code - 1) for code in codes])
    assert torch.equal(dequantize(planes, scheme, n, 2 * size), expected.flatten(1))


@pytest.mark.parametrize("name", GGUF_LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1 << 30))
def test_blocks_survive_the_way_there_and_back(name: str, n: int, count: int, seed: int) -> None:
    blocks = random_blocks(name, n, count, seed)
    scheme, planes = planes_of_gguf(blocks, name, n, count * sizes(name)[0])
    assert torch.equal(gguf_of_planes(planes, scheme), blocks)


@pytest.mark.parametrize("name", [name for name, layout in GGUF_LAYOUTS.items() if layout.halves])
def test_halves_of_any_bits_survive(name: str) -> None:
    """Infinities, many a nan and both zeros: nothing interprets a number on the way."""
    size, nbytes = sizes(name)
    special = [0x8000, 0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7E00, 0x0001, 0x8001]
    patterns = [*special, *range(0, 31 * 2112, 31)]
    halves = torch.tensor(patterns).to(torch.uint16).view(torch.uint8).view(8, -1, 2)
    count = halves.shape[1]
    blocks = random_blocks(name, 8, count).view(8, count, nbytes).clone()
    for at in GGUF_LAYOUTS[name].halves.values():
        blocks[..., at : at + 2] = halves
    blocks = blocks.flatten(1)
    scheme, planes = planes_of_gguf(blocks, name, 8, size * count)
    assert torch.equal(gguf_of_planes(planes, scheme), blocks)


@pytest.mark.parametrize("name", GGUF_LAYOUTS)
def test_what_fxquant_quantizes_is_a_file_of_gguf(name: str) -> None:
    n, k = 3, 2 * sizes(name)[0]
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse(name.lower())
    planes = quantize(weight, scheme, "absmax")
    if name == "NVFP4":  # the second level is in a tensor of its own
        blocks = gguf_of_planes(planes, scheme)
        again = planes_of_gguf(blocks, name, n, k, scale=planes["scale_scales"].view(1))[1]
    else:
        blocks = gguf_of_planes(planes, scheme)
        again = planes_of_gguf(blocks, name, n, k)[1]
        if name not in UNKNOWN_TO_GGUF:
            assert torch.equal(reference(blocks, name), dequantize(planes, scheme, n, k))
    assert all(torch.equal(again[plane], planes[plane]) for plane in planes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_gguf_quantizes_comes_through(name: str) -> None:
    from gguf import GGMLQuantizationType

    weight = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    blocks = torch.from_numpy(quants.quantize(weight, GGMLQuantizationType[name]))
    scheme, planes = planes_of_gguf(blocks, name, 4, 512)
    assert torch.equal(gguf_of_planes(planes, scheme), blocks)
    assert torch.equal(dequantize(planes, scheme, 4, 512), reference(blocks, name))


def test_the_tensor_beside_nvfp4() -> None:
    blocks = random_blocks("NVFP4", 2, 3)
    scheme, planes = planes_of_gguf(blocks, "NVFP4", 2, 192, scale=torch.tensor([0.25]))
    assert torch.equal(dequantize(planes, scheme, 2, 192), reference(blocks, "NVFP4") * 0.25)


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_vectors_have_no_way_back(name: str) -> None:
    scheme, planes = planes_of_gguf(random_blocks(name, 1, 1), name, 1, 256)
    with pytest.raises(CheckpointError, match="GGUF has no type for"):
        gguf_of_planes(planes, scheme)


def test_planes_of_another_scheme_are_refused() -> None:
    scheme, planes = planes_of_gguf(random_blocks("Q4_K", 2, 2), "Q4_K", 2, 512)
    with pytest.raises(CheckpointError, match="not the planes of a q5_k weight"):
        gguf_of_planes(planes, Scheme.parse("q5_k"))
    with pytest.raises(CheckpointError, match="not the planes of a q4_k weight"):
        gguf_of_planes({name: plane for name, plane in planes.items() if name != "biases"}, scheme)
    with pytest.raises(CheckpointError, match="GGUF has no type for int4"):
        gguf_of_planes(planes, Scheme.parse("int4"))


@pytest.mark.parametrize("name", TYPES)
def test_hostile_blocks(name: str) -> None:
    blocks, (size, _) = random_blocks(name, 2, 2), sizes(name)
    for bad, n, k in (
        (blocks[:, :-1], 2, 2 * size),
        (blocks, 3, 2 * size),
        (blocks, 2, 2 * size + 1),
        (blocks, 2, 1 << 60),
        (blocks, 1 << 60, 2 * size),
        (blocks, 0, 2 * size),
        (blocks, -2, -2 * size),
        (blocks.to(torch.int8), 2, 2 * size),
        (blocks.view(-1), 2, 2 * size),
        (blocks[:0], 2, 2 * size),
        (blocks.to("meta"), 2, 2 * size),
    ):
        with pytest.raises(CheckpointError, match=f"GGUF {name}"):
            planes_of_gguf(bad, name, n, k)


def test_no_such_type() -> None:
    with pytest.raises(CheckpointError, match=r"did you mean .*Q4_K"):
        planes_of_gguf(torch.zeros(1, 144, dtype=torch.uint8), "Q4_KM", 1, 256)


def test_scales_of_nvfp4_that_are_no_numbers() -> None:
    blocks = torch.zeros(1, 36, dtype=torch.uint8)
    blocks[0, 1] = 0x7F
    with pytest.raises(CheckpointError, match="nan or negative"):
        planes_of_gguf(blocks, "NVFP4", 1, 64)
