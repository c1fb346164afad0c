import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.layouts.bits import (
    BLOCK_ENTRIES,
    byte_view,
    count_bits,
    is_subset,
    pack_bits,
    padding_is_clear,
    row_blocks,
    unpack_bits,
    words_per_row,
)
from deltakeeper.layouts.philox import philox, philox_key, seeded_mask

matrices = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=70))


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[int(word) & 0xFFFFFFFF for word in row] for row in words]


def test_normative_vector():
    bits = torch.arange(35)[None] % 3 == 0
    words = pack_bits(bits)
    assert unsigned(words) == [[0x49249249, 0x00000002]]
    assert byte_view(words).tobytes() == bytes.fromhex("4992244902000000")


@given(matrices)
def test_every_bit_lies_where_the_format_says(array):
    words = pack_bits(torch.from_numpy(array))
    rows, columns = array.shape
    expected = [[0] * words_per_row(columns) for _ in range(rows)]
    for row, column in zip(*np.nonzero(array), strict=True):
        expected[row][column // 32] |= 1 << (column % 32)
    assert unsigned(words) == expected


@given(matrices)
def test_packing_round_trips_with_clear_padding(array):
    bits = torch.from_numpy(array)
    words = pack_bits(bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, array.shape[1]), bits)
    assert padding_is_clear(words, array.shape[1])
    assert count_bits(words) == int(array.sum())


@given(matrices, st.data())
def test_subset_means_subset(array, data):
    other = data.draw(arrays(np.bool_, array.shape))
    words, of = pack_bits(torch.from_numpy(array)), pack_bits(torch.from_numpy(other))
    assert is_subset(words, of) == bool((array <= other).all())


@pytest.mark.parametrize("columns", [1, 31, 33, 35, 63])
def test_a_padding_bit_is_seen(columns):
    words = pack_bits(torch.ones(2, columns, dtype=torch.bool))
    byte_view(words)[1, -1] |= 0x80
    assert not padding_is_clear(words, columns)


@given(st.integers(1, 5000), st.integers(1, 2 * BLOCK_ENTRIES))
def test_row_blocks_cover_each_row_once(rows, columns):
    blocks = list(row_blocks(rows, columns))
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert blocks[-1].stop == rows
    assert all((b.stop - b.start) * columns <= max(columns, BLOCK_ENTRIES) for b in blocks)


def test_philox_known_answers():
    assert philox((0, 0), 0, 1).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    assert philox(philox_key(0, "a"), 0, 1).tolist() == [[0x95BD71E7, 0x37E2E23C, 0xCAE11B95, 0x3F8F5B82]]


def test_philox_key_is_two_little_endian_words():
    digest = hashlib.sha256((2**64 - 1).to_bytes(8, "little") + "é".encode()).digest()
    assert np.frombuffer(digest[:8], "<u4").tolist() == list(philox_key(2**64 - 1, "é"))


def scalar_philox(key, counter):
    """Salmon et al. 2011, figure 2, one counter at a time in Python integers."""
    x = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k0, k1 = key
    for _ in range(10):
        left, right = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(right >> 32) ^ x[1] ^ k0, right & 0xFFFFFFFF, (left >> 32) ^ x[3] ^ k1, left & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), st.integers(0, 2**63))
def test_philox_equals_the_scalar_definition(key, first):
    assert philox(key, first, 3).tolist() == [scalar_philox(key, first + i) for i in range(3)]


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**64 - 1), st.floats(0.01, 1.0))
def test_mask_reads_flat_row_major_lanes(rows, columns, seed, keep):
    mask = unpack_bits(seeded_mask((rows, columns), seed=seed, name="w", keep=keep), columns)
    words = philox(philox_key(seed, "w"), 0, rows * columns).reshape(-1)[: rows * columns]
    assert mask.flatten().tolist() == [int(word) < int(keep * 2**32) for word in words]


def test_mask_does_not_depend_on_the_block_size(monkeypatch):
    draw = {"seed": 3, "name": "w", "keep": 0.3}
    whole = seeded_mask((40, 33), **draw)
    monkeypatch.setattr("deltakeeper.layouts.bits.BLOCK_ENTRIES", 70)
    monkeypatch.setattr("deltakeeper.layouts.philox._CHUNK", 3)
    assert torch.equal(seeded_mask((40, 33), **draw), whole)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 1.0])
def test_mask_keeps_the_stated_share(keep):
    kept = count_bits(seeded_mask((500, 400), seed=0, name="w", keep=keep)) / 200_000
    assert kept == pytest.approx(keep, abs=5 * (keep * (1 - keep) / 200_000) ** 0.5 + 1e-9)
