"""Mask kinds against scalar loops, and what their readers refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.bits import pack_bits, unpack_bits
from deltakeeper.layouts.masks import BitMask, GapMask, SeedMask, TwoFourMask, best_mask, expected_mask_bytes
from deltakeeper.layouts.philox import philox, philox_key, seeded_mask

sparse_rows = arrays(
    np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=900), elements=st.sampled_from([False] * 60 + [True])
)
small = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=40))


def scalar_gaps(array):
    """The gap bytes of each row, one entry at a time."""
    rows = []
    for row in array:
        found, skipped = [], 0
        for kept in row:
            if kept:
                found += [255] * (skipped // 255) + [skipped % 255]
                skipped = 0
            else:
                skipped += 1
        rows.append(found)
    return rows


@settings(max_examples=40, deadline=None)
@given(st.one_of(sparse_rows, small))
def test_gaps_equal_the_scalar_definition(array):
    mask = GapMask.from_words(pack_bits(torch.from_numpy(array)), array.shape[1])
    rows = scalar_gaps(array)
    assert mask.row_bytes.tolist() == [len(row) for row in rows]
    assert mask.gaps.tolist() == [byte for row in rows for byte in row]
    mask.check(array.shape, int(array.sum()))
    assert torch.equal(unpack_bits(mask.words(array.shape), array.shape[1]), torch.from_numpy(array))


@pytest.mark.parametrize("column", [0, 254, 255, 256, 509, 510, 511, 999])
def test_escapes_at_their_edges(column):
    array = np.zeros((1, 1000), dtype=np.bool_)
    array[0, column] = True
    mask = GapMask.from_words(pack_bits(torch.from_numpy(array)), 1000)
    assert mask.gaps.tolist() == [255] * (column // 255) + [column % 255]
    assert torch.equal(unpack_bits(mask.words((1, 1000)), 1000), torch.from_numpy(array))


def gap_mask(gaps, row_bytes):
    return GapMask(torch.tensor(gaps, dtype=torch.uint8), torch.tensor(row_bytes, dtype=torch.int32))


@pytest.mark.parametrize(
    ("gaps", "row_bytes", "nnz", "message"),
    [
        ([9, 0], [1, 1], 2, None),
        ([10, 0], [1, 1], 2, "past the end"),
        ([4, 5], [2, 0], 2, "past the end"),
        ([0, 255, 0], [1, 2], 2, "past the end"),
        ([0, 255], [1, 1], 1, "ends in an escape"),
        ([0, 0], [1, 2], 2, "add up"),
        ([0, 0], [3, -1], 2, "add up"),
        ([0, 0], [2**31 - 1, 2**31 - 1], 2, "add up"),
        ([0, 0], [1, 1], 1, "its mask has 2"),
    ],
)
def test_gaps_that_break_the_rules_are_refused(gaps, row_bytes, nnz, message):
    mask = gap_mask(gaps, row_bytes)
    if message is None:
        return mask.check((2, 10), nnz)
    with pytest.raises(LayoutError, match=message):
        mask.check((2, 10), nnz)


@pytest.mark.parametrize("entries", [-1, 3])
def test_a_count_of_gap_bytes_beyond_any_mask_is_refused(entries):
    with pytest.raises(LayoutError, match="'gap_bytes'"):
        GapMask.expect((2, 254), 2, {"gap_bytes": entries})
    assert GapMask.expect((2, 255), 2, {"gap_bytes": 4})


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=12), st.lists(st.integers(-1, 8), min_size=3, max_size=3), st.integers(1, 600))
def test_no_gaps_crash_the_reader(raw, row_bytes, columns):
    mask = gap_mask(list(raw), row_bytes)
    nnz = sum(byte != 255 for byte in raw)
    try:
        mask.check((3, columns), nnz)
    except LayoutError:
        return
    assert torch.equal(GapMask.from_words(mask.words((3, columns)), columns).gaps, mask.gaps)


def two_of_four(rows, columns, seed):
    """A random mask that keeps two of each four columns, and the place of each kept entry in its group."""
    rng = np.random.default_rng(seed)
    array, places = np.zeros((rows, columns), dtype=np.bool_), []
    for row in range(rows):
        places.append([])
        for start in range(0, columns, 4):
            width = min(4, columns - start)
            chosen = sorted(rng.choice(width, size=min(2, width), replace=False))
            array[row, [start + place for place in chosen]] = True
            places[-1] += [int(place) for place in chosen]
    return array, places


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_two_of_four_equals_the_scalar_definition(rows, columns, seed):
    array, places = two_of_four(rows, columns, seed)
    mask = TwoFourMask.from_words(pack_bits(torch.from_numpy(array)), columns)
    mask.check(array.shape, int(array.sum()))
    for row, wanted in enumerate(places):
        stream = b"".join(int(word & 0xFFFFFFFF).to_bytes(4, "little") for word in mask.indices[row].tolist())
        bits = int.from_bytes(stream, "little")
        assert [bits >> 2 * i & 3 for i in range(len(wanted))] == wanted
        assert bits >> 2 * len(wanted) == 0
    assert torch.equal(unpack_bits(mask.words(array.shape), columns), torch.from_numpy(array))
    assert mask.nbytes == 4 * rows * math.ceil(len(places[0]) / 16)


@pytest.mark.parametrize("columns", [4, 6, 9])
def test_other_masks_are_no_two_of_four(columns):
    for kept in (0, 1, columns):
        array = torch.arange(columns)[None] < kept
        with pytest.raises(LayoutError, match="two of each four"):
            TwoFourMask.from_words(pack_bits(array), columns)


@pytest.mark.parametrize(
    ("word", "columns", "message"),
    [
        (0b0100, 4, None),
        (0b0001, 4, "ascend"),
        (0b0101, 4, "ascend"),
        (0b0100 | 1 << 4, 4, "padding"),
        (0b1100, 3, "leave the row"),
        (0b010100, 5, "leave the row"),
        (0b000100, 5, None),
    ],
)
def test_places_that_break_the_rules_are_refused(word, columns, message):
    mask = TwoFourMask(torch.tensor([[word]], dtype=torch.int32))
    if message is None:
        return mask.check((1, columns), TwoFourMask.kept_per_row(columns))
    with pytest.raises(LayoutError, match=message):
        mask.check((1, columns), TwoFourMask.kept_per_row(columns))


def test_two_of_four_states_how_many_it_keeps():
    assert [TwoFourMask.kept_per_row(columns) for columns in range(1, 9)] == [1, 2, 2, 2, 3, 4, 4, 4]
    with pytest.raises(LayoutError, match="states 5 kept entries"):
        TwoFourMask.expect((2, 5), 5, {})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 50), st.integers(0, 2**64 - 1), st.data())
def test_rates_per_row_read_flat_row_major_words(rows, columns, seed, data):
    rates = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), min_size=rows, max_size=rows))
    mask = SeedMask(seed, "w", torch.tensor(rates))
    words = philox(philox_key(seed, "w"), 0, rows * columns).reshape(-1)
    found = unpack_bits(mask.words((rows, columns)), columns)
    for row in range(rows):
        threshold = int(float(np.float32(rates[row])) * 2**32)
        wanted = [int(word) < threshold for word in words[row * columns : (row + 1) * columns]]
        assert found[row].tolist() == wanted
    assert mask.count((rows, columns)) == int(found.sum())


def test_one_rate_for_all_rows_is_the_plain_mask(monkeypatch):
    monkeypatch.setattr("deltakeeper.layouts.masks.draws._COUNTERS", 3)
    plain = seeded_mask((9, 35), seed=4, name="w", keep=0.25)
    assert torch.equal(SeedMask(4, "w", torch.full((9,), 0.25)).words((9, 35)), plain)
    assert torch.equal(SeedMask(4, "w", 0.25).words((9, 35)), plain)
    assert SeedMask(4, "w", 0.25).count((9, 35)) == int(unpack_bits(plain, 35).sum())


@pytest.mark.parametrize(
    ("keep", "nnz", "message"),
    [
        (0.5, 500_000, None),
        (0.5, 400_000, "its mask has 500000"),
        (1e-6, 1, "less than one entry in 16384"),
        ([0.5, -0.5], 0, "less than one entry in 16384"),
        ([0.5, 1.5], 0, "more than all"),
        ([1e-9, 0.5], 0, "less than one entry in 16384"),
        ([0.0, 0.5], 250_000, None),
        ([0.0, 0.0], 100, "its mask has 0"),
    ],
)
def test_rates_that_cannot_give_the_count_are_refused_without_a_draw(keep, nnz, message, monkeypatch):
    monkeypatch.setattr("deltakeeper.layouts.masks.seed.draw_words", None)
    mask = SeedMask(0, "w", torch.tensor(keep) if isinstance(keep, list) else keep)
    if message is None:
        return mask.check((2, 500_000), nnz)
    with pytest.raises(LayoutError, match=message):
        mask.check((2, 500_000), nnz)


@pytest.mark.parametrize("name", ["\ud800", "a\nb", ""])
def test_a_name_that_cannot_be_hashed_is_refused(name):
    with pytest.raises(LayoutError, match="'tensor'"):
        SeedMask.expect((2, 3), 1, {"seed": 0, "tensor": name, "keep": 0.5})


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 600), st.floats(0, 1), st.integers(0, 99))
def test_the_best_mask_is_the_smaller_of_bits_and_gaps(rows, columns, keep, seed):
    words = pack_bits(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < keep)
    bits, gaps = BitMask(words), GapMask.from_words(words, columns)
    best = best_mask(words, columns)
    assert best.nbytes == min(bits.nbytes, gaps.nbytes)
    assert best.kind == ("gaps" if gaps.nbytes < bits.nbytes else "bits")
    assert torch.equal(best.words((rows, columns)), words)


@pytest.mark.parametrize("keep", [0.001, 0.01, 0.05, 0.11, 0.5])
def test_the_expected_size_is_near(keep):
    shape = (200, 3000)
    words = pack_bits(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < keep)
    found = best_mask(words, shape[1]).nbytes
    assert expected_mask_bytes(shape, round(keep * 600_000)) == pytest.approx(found, rel=0.03)


def test_the_expected_size_of_nothing_and_of_all():
    assert expected_mask_bytes((3, 64), 0) == 12
    assert expected_mask_bytes((3, 64), 3 * 64) == 24
