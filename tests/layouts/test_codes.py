import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.codes import code_padding_is_clear, code_words, pack_codes, unpack_codes


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([i % 3 == 0 for i in range(35)], 1, [0x49249249, 0x00000002]),
        ([i % 8 for i in range(35)], 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA, 0x00000088]),
    ],
)
def test_the_vectors_of_the_format(codes, bits, words):
    packed = pack_codes(torch.tensor([codes]).to(torch.uint8), bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words
    assert unpack_codes(packed, bits, 35)[0].tolist() == codes


@st.composite
def coded(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 80)))
    return bits, torch.from_numpy(draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))))


@given(coded())
def test_a_row_is_one_long_number_with_its_first_code_lowest(case):
    bits, codes = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(codes), code_words(codes.shape[1], bits))
    for row, words in zip(codes.tolist(), packed, strict=True):
        number = sum(code << (index * bits) for index, code in enumerate(row))
        assert int.from_bytes(words.numpy().tobytes(), "little") == number
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)
    assert code_padding_is_clear(packed, bits, codes.shape[1])


def test_views_are_packed_like_their_copies():
    codes = torch.arange(60, dtype=torch.uint8).reshape(6, 10) % 8
    assert torch.equal(pack_codes(codes.T, 3), pack_codes(codes.T.contiguous(), 3))
    assert torch.equal(unpack_codes(pack_codes(codes, 3)[2:4], 3, 10), codes[2:4])


def test_one_bit_is_the_order_of_packed_bits():
    bits = torch.arange(3 * 45).reshape(3, 45) % 7 < 3
    assert torch.equal(pack_codes(bits.to(torch.uint8), 1), pack_bits(bits))


def test_matrices_of_several_blocks_round_trip():
    codes = (torch.arange(3 * 200_001).reshape(3, -1) % 29).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, 5), 5, 200_001), codes)


def test_set_padding_bits_are_seen():
    packed = pack_codes(torch.zeros(2, 7, dtype=torch.uint8), 3)
    packed[1, 0] = 1 << 21
    assert not code_padding_is_clear(packed, 3, 7)
