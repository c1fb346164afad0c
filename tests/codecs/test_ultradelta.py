"""UltraDelta's three steps, each against a straightforward version in Python numbers."""

import hashlib
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.codecs import Statistics, UltraDelta, parse_codec
from deltakeeper.errors import CodecError
from deltakeeper.layouts.philox import philox

deltas = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.floats(-4, 4, width=16))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(codec, delta, name="w"):
    (term,) = codec.encode(delta, name=name)
    return term


def words_of(name, seed, count):
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    return [int(word) for word in philox(key, 0, -(-count // 4)).reshape(-1)[:count]]


def by_the_paper(delta, p, bits, factor, name, seed):
    """Min-max levels with zero on the grid, an exact share dropped of each, the rest times a factor."""
    flat = [float(value) for value in delta.flatten()]
    low, high = min(0.0, *flat), max(0.0, *flat)
    step = (high - low) / (2**bits - 1) or 1.0
    zero = round(-low / step)
    levels = [min(2**bits - 1, max(0, round(value / step) + zero)) for value in flat]
    members = defaultdict(list)
    for place, (level, word) in enumerate(zip(levels, words_of(name, seed, len(flat)), strict=True)):
        members[level].append((word, place))
    found = [0.0] * len(flat)
    zeros = len(members[zero]) / len(flat)
    share = max(0.0, (p - zeros) / (1 - zeros)) if zeros < 1 else 0.0
    for level, entries in members.items():
        for _, place in sorted(entries)[round(share * len(entries)) :]:
            found[place] = (level - zero) * float(np.float32(step * factor))
    return torch.tensor(found).view(delta.shape)


@settings(max_examples=60, deadline=None)
@given(deltas, st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.97]), st.integers(2, 8), st.integers(0, 3))
def test_the_formula(array, p, bits, seed):
    delta = torch.from_numpy(array)
    for rescale, factor in (("none", 1.0), ("mean", 1 / (1 - p))):
        codec = UltraDelta(p=p, bits=bits, rescale=rescale, seed=seed)
        found = encode(codec, delta).to_dense()
        torch.testing.assert_close(found, by_the_paper(delta, p, bits, factor, "w", seed), rtol=1e-6, atol=0.0)


def test_large_matrices_are_thinned_like_small_ones(monkeypatch):
    delta = gaussian(90, 111)
    whole = by_the_paper(delta, 0.8, 5, 5.0, "w", 2)
    codec = UltraDelta(p=0.8, bits=5, seed=2)
    torch.testing.assert_close(encode(codec, delta).to_dense(), whole, rtol=1e-6, atol=0.0)
    monkeypatch.setattr("deltakeeper.layouts.masks.draws._COUNTERS", 50)
    monkeypatch.setattr("deltakeeper.layouts.bits.BLOCK_ENTRIES", 500)
    torch.testing.assert_close(encode(codec, delta).to_dense(), whole, rtol=1e-6, atol=0.0)


def test_untouched_weights_do_not_move():
    delta = gaussian(50, 60) + 3.0
    delta[::2] = 0.0
    assert not encode(UltraDelta(p=0.0), delta).to_dense()[::2].any()


@pytest.mark.parametrize("p", [0.2, 0.75])
def test_each_level_loses_its_share_until_so_many_are_zero(p):
    delta = gaussian(300, 400)
    delta[::3] = 0.0
    before = encode(UltraDelta(p=0.0, rescale="none"), delta).to_dense()
    after = encode(UltraDelta(p=p, rescale="none"), delta).to_dense()
    zeros = float((before == 0).double().mean())
    share = max(0.0, (p - zeros) / (1 - zeros))
    assert float((after == 0).double().mean()) == pytest.approx(max(p, zeros), abs=1e-4)
    for level in before.unique():
        if level:
            count = int((before == level).sum())
            assert int((after == level).sum()) == count - round(share * count)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_trace_gives_the_nuclear_norm_of_the_delta(shape):
    delta = gaussian(*shape) * 1e-6
    found = encode(UltraDelta(p=0.8, rescale="trace"), delta).to_dense()
    wanted = torch.linalg.svdvals(delta.double()).sum()
    torch.testing.assert_close(torch.linalg.svdvals(found.double()).sum(), wanted, rtol=1e-3, atol=0.0)


def survey(*sizes_and_stds):
    return {f"w{i}": Statistics((size, 10), std, std, 0.0) for i, (size, std) in enumerate(sizes_and_stds)}


def shares(codec, found):
    return [codec.spread(found)[name].p for name in found]


def test_thirds_of_the_weights_by_their_spread():
    found = survey((30, 5.0), (10, 1.0), (20, 2.0), (30, 3.0))
    codec = UltraDelta(p=0.9, step=0.05)
    assert shares(codec, found) == pytest.approx([0.85, 0.95, 0.95, 0.9])
    assert codec.surveys
    for part in codec.spread(found).values():
        assert not part.surveys
        assert part == parse_codec(f"ultradelta:p={part.p},step=0,rescale_p=0.9")


def test_all_tensors_are_rescaled_by_the_average_share():
    found = UltraDelta(p=0.5, step=0.3).spread(survey((30, 1.0), (30, 2.0), (30, 3.0)))
    assert [part.p for part in found.values()] == pytest.approx([0.8, 0.5, 0.2])
    for part in found.values():
        kept = encode(part, gaussian(40, 50)).to_dense()
        levels = encode(UltraDelta(p=0.0, rescale="none"), gaussian(40, 50)).to_dense()
        torch.testing.assert_close(kept[kept != 0], 2 * levels[kept != 0], rtol=1e-6, atol=0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.0, 1e-8, 0.5, 1.0, 2.0])), min_size=1, max_size=12),
    st.sampled_from([0.5, 0.9, 0.97]),
)
def test_the_mean_share_is_what_was_asked_for(sizes_and_stds, p):
    found = survey(*sizes_and_stds)
    codec = UltraDelta(p=p, step=0.01)
    each = shares(codec, found)
    sizes = [size for size, _ in sizes_and_stds]
    mean = math.fsum(size * share for size, share in zip(sizes, each, strict=True)) / sum(sizes)
    assert mean == pytest.approx(p, abs=2e-6)
    by_spread = [each[i] for i in sorted(range(len(each)), key=lambda i: (sizes_and_stds[i][1], f"w{i}"))]
    assert by_spread == sorted(by_spread, reverse=True)


def test_without_a_step_no_survey_is_needed():
    codec = UltraDelta(step=0)
    assert not codec.surveys
    assert codec.spread(survey((1, 1.0))) == {"w0": codec}


@pytest.mark.parametrize("p", [0.9, 0.97])
def test_the_expected_size_bounds_the_size(p):
    delta = gaussian(300, 4096)
    codec = UltraDelta(p=p, bits=8)
    size = encode(codec, delta).nbytes
    assert 0.95 * codec.expected_bytes((300, 4096)) < size <= codec.expected_bytes((300, 4096)) * 1.01


@pytest.mark.parametrize(("size", "p"), [(3e38, 0.9), (1e-45, 0.0)])
def test_a_scale_that_leaves_float32_is_refused(size, p):
    with pytest.raises(CodecError, match="'w' leaves float32"):
        UltraDelta(p=p).encode(torch.tensor([[size, -size]]), name="w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 1.0}, "at most 0.99"),
        ({"p": -0.1}, "at least 0"),
        ({"step": 0.6}, "at most 0.5"),
        ({"bits": 1}, "at least 2"),
        ({"bits": 16}, "at most 8"),
        ({"rescale": "max"}, "one of none, mean, trace"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(CodecError, match=message):
        UltraDelta(**settings)
