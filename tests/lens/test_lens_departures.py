"""Layers of departure and return: found by hand on planted distances, with intervals that know of seeds and prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from deltakeeper.lens.correlation import rank_correlations
from deltakeeper.lens.departures import (
    DEPARTS,
    crossed_counts,
    find_departure,
    find_return,
    weighted_median,
)

LAYERS = [0, 2, 4, 6, 8]
FAR, NEAR = 10 * DEPARTS, DEPARTS / 10
ONCE = np.ones((1, 3))


def rows(*shares):
    return np.array([shares] * 3)


@pytest.mark.parametrize(
    ("distances", "layer"),
    [
        ((NEAR, NEAR, FAR, FAR, FAR), 4),
        ((FAR, NEAR, NEAR, NEAR, FAR), 8),
        ((FAR, FAR, FAR, FAR, NEAR), None),
        ((FAR,) * 5, 0),
        ((DEPARTS,) * 5, 0),
        ((NEAR,) * 5, None),
    ],
)
def test_a_departure_lasts_to_the_end(distances, layer):
    found = find_departure(rows(*distances), LAYERS, ONCE)
    assert (found.layer, found.low, found.high) == (layer, layer, layer)
    assert found.never == (layer is None)


@pytest.mark.parametrize(
    ("to_base", "to_tuned", "layer"),
    [
        ((0, 0, FAR, NEAR, NEAR), (0, 0, NEAR, FAR, FAR), 6),
        ((0, 0, NEAR, NEAR, NEAR), (0, 0, FAR, FAR, FAR), 4),  # before layer 4 there is nothing to return from
        ((0, 0, NEAR, FAR, NEAR), (0, 0, FAR, NEAR, FAR), 8),
        ((0, 0, FAR, FAR, FAR), (0, 0, 0, 0, 0), None),
        ((0, 0, NEAR, NEAR, NEAR), (0, 0, NEAR, NEAR, NEAR), None),  # as far from one as from the other
    ],
)
def test_a_return_is_to_the_base_and_lasts(to_base, to_tuned, layer):
    found = find_return(rows(*to_base), rows(*to_tuned), rows(0, 0, FAR, FAR, FAR), LAYERS, ONCE)
    assert found.layer == layer


def test_nothing_returns_from_a_fine_tune_that_never_left():
    found = find_return(rows(*[0.0] * 5), rows(*[FAR] * 5), rows(*[NEAR] * 5), LAYERS, ONCE)
    assert found.layer is None and found.never == 1


def test_an_interval_spans_what_prompts_disagree_on():
    early, late = [NEAR, FAR, FAR, FAR, FAR], [NEAR, NEAR, NEAR, FAR, FAR]
    distances = np.array([early] * 6 + [late] * 6)
    counts = crossed_counts([0] * 12, range(12), resamples=500)
    found = find_departure(distances, LAYERS, counts)
    assert (found.low, found.high) == (2, 6) and found.layer in (2, 6)
    never = np.array([early] * 11 + [[NEAR] * 5] * 9)
    found = find_departure(never, LAYERS, crossed_counts([0] * 20, range(20), resamples=2000))
    assert found.layer == 2 and found.high is None and 0.1 < found.never < 0.6


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=12))
def test_a_weighted_median_is_that_of_repeated_values(pairs):
    values = np.array([[value] for value, _ in pairs])
    counts = np.array([[count for _, count in pairs]], dtype=float)
    repeated = sorted(v for v, c in pairs for _ in range(c))
    found = weighted_median(values, counts)[0, 0]
    if repeated:
        assert found == repeated[(len(repeated) - 1) // 2]
    else:
        assert np.isnan(found)


def test_absent_numbers_do_not_count():
    values = np.array([[np.nan, 1.0], [2.0, np.nan], [3.0, np.nan]])
    found = weighted_median(values, np.ones((2, 3)))
    assert found.tolist() == [[2.0, 1.0]] * 2
    assert np.isnan(weighted_median(np.full((2, 1), np.nan), np.ones((1, 2)))).all()


def test_a_prompt_read_under_several_seeds_comes_and_goes_as_one():
    counts = crossed_counts([0, 0, 1, 1], ["a", "b", "a", "b"], resamples=200, seed=1)
    assert counts.shape[1] == 4
    seeds = counts.reshape(-1, 2, 2)  # (resamples, seeds, prompts): a product of two draws
    assert (seeds[:, 0, 0] * seeds[:, 1, 1] == seeds[:, 0, 1] * seeds[:, 1, 0]).all()
    assert set(counts.sum(1)) == {4.0} and len(np.unique(counts, axis=0)) > 4


def test_rank_correlations_are_those_of_scipy_row_by_row():
    random = np.random.default_rng(3)
    one, other = random.normal(size=(2, 6, 9))
    other[1] = one[1]
    other[2, 3:] = other[2, 3]  # ties
    one[3] = 1.0
    other[4, 0] = np.nan
    found = rank_correlations(one, other)
    for row in (0, 1, 2, 5):
        assert found[row] == pytest.approx(spearmanr(one[row], other[row]).statistic)
    assert np.isnan(found[[3, 4]]).all()
