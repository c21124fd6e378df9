import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bits import pack, pack_trits, pack_wide, unpack, unpack_trits, unpack_wide

shapes = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda head: st.integers(0, 40).map(lambda n: (*head, n)),
)


def fields(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def stream(row: list[int], bits: int) -> list[int]:
    """The bytes of one row, as an integer of any size sees them."""
    word = sum(code << (i * bits) for i, code in enumerate(row))
    return list(word.to_bytes(math.ceil(len(row) * bits / 8), "little"))


@settings(deadline=None)
@given(shapes, st.integers(1, 8), st.integers(0, 2**31))
def test_unpack_inverts_pack(shape, bits, seed):
    codes = fields(shape, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] * bits / 8))
    assert packed.is_contiguous()
    unpacked = unpack(packed, bits, shape[-1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_rows_are_little_endian_bit_streams(n, k, bits, seed):
    codes = fields((n, k), bits, seed)
    assert pack(codes, bits).tolist() == [stream(row, bits) for row in codes.tolist()]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 12), st.integers(0, 2**31))
def test_slices_of_other_tensors(bits, offset, width, seed):
    """Odd offsets, odd strides, transposed: nothing about memory layout may show."""
    codes = fields((7, 19), bits, seed)
    for part in (codes[:, offset : offset + width], codes[2:3, offset : offset + width], codes.t()[offset:, :5]):
        packed = pack(part, bits)
        assert torch.equal(packed, pack(part.clone(), bits))
        shifted = torch.cat((packed[:, :1], packed), 1)[:, 1:]
        assert torch.equal(unpack(shifted, bits, part.shape[1]), part)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    codes = torch.tensor([[1, 2, 3, 4, 5], [7, 6, 5, 4, 3]])
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes.to(torch.uint8), 3))


@pytest.mark.parametrize("bits", range(1, 9))
def test_results_share_no_memory(bits):
    codes = fields((2, 8), bits, 0)
    packed = pack(codes, bits)
    before = packed.clone()
    unpack(packed, bits, 8).zero_()
    assert torch.equal(packed, before)
    packed.zero_()
    assert torch.equal(codes, fields((2, 8), bits, 0))


def test_low_nibble_is_the_even_index():
    assert pack(torch.tensor([0x1, 0xA, 0x7]), 4).tolist() == [0xA1, 0x07]


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_widths_that_do_not_exist(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), bits, 4)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_rows_of_the_wrong_length(size):
    with pytest.raises(ValueError, match="take 3 bytes"):
        unpack(torch.zeros(2, size, dtype=torch.uint8), 3, 7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_meta(bits):
    packed = pack(torch.empty(3, 5, dtype=torch.uint8, device="meta"), bits)
    assert packed.shape == (3, math.ceil(5 * bits / 8))
    assert unpack(packed, bits, 5).shape == (3, 5)


@settings(deadline=None)
@given(shapes, st.integers(1, 32), st.integers(0, 2**31))
def test_wide_fields(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    packed = pack_wide(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*shape[:-1], math.ceil(shape[-1] * bits / 8)))
    assert torch.equal(unpack_wide(packed, bits, shape[-1]), codes)
    if codes.numel():
        rows = codes.reshape(-1, shape[-1]).tolist()
        assert packed.reshape(len(rows), -1).tolist() == [stream(row, bits) for row in rows]
    if bits <= 8:
        assert torch.equal(packed, pack(codes, bits))


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_digits_in_base_3(shape, seed):
    codes = torch.randint(0, 3, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_trits(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*shape[:-1], math.ceil(shape[-1] / 5)))
    assert torch.equal(unpack_trits(packed, shape[-1]), codes)


def test_the_first_digit_counts_least():
    assert pack_trits(torch.tensor([1, 2, 0, 0, 2, 1])).tolist() == [1 + 2 * 3 + 2 * 81, 1]


@pytest.mark.parametrize("bits", [0, 33])
def test_wide_widths_that_do_not_exist(bits):
    with pytest.raises(ValueError, match="fields have 1 to 32 bits"):
        pack_wide(torch.zeros(3), bits)
    with pytest.raises(ValueError, match="fields have 1 to 32 bits"):
        unpack_wide(torch.zeros(3, dtype=torch.uint8), bits, 1)


def test_wide_rows_of_the_wrong_length():
    with pytest.raises(ValueError, match="2 fields of 12 bits take 3 bytes, got 4"):
        unpack_wide(torch.zeros(4, dtype=torch.uint8), 12, 2)
    with pytest.raises(ValueError, match="6 digits in base 3 take 2 bytes, got 1"):
        unpack_trits(torch.zeros(1, dtype=torch.uint8), 6)
