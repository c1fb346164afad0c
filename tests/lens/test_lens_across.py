"""Across sets of prompts and across variants: where sets part, and whether what is kept goes with behaviour."""

from __future__ import annotations

import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest
from lens_traces import LAYERS, make_traces
from scipy.stats import spearmanr

from deltakeeper.errors import DataError
from deltakeeper.lens.correlation import correlate
from deltakeeper.lens.divergence import find_divergence


def set_entropy(trace, values):
    return dataclasses.replace(trace, entropy=np.repeat(np.array(values, dtype=np.float32)[:, None], 2, 1))


def draw_set(n, seed, shift):
    """Traces whose entropy is random, moved by `shift` at each layer."""
    trace, rng = make_traces()["half"], np.random.default_rng(seed)
    return [set_entropy(trace, 10 + rng.normal(size=LAYERS) + shift) for _ in range(n)]


def test_sets_part_where_they_were_made_to():
    found = find_divergence(draw_set(20, 0, np.array([0, 0, 4, 4])), draw_set(20, 1, 0), "entropy")
    assert found.layer == 2 and (found.first, found.second) == (20, 20)
    assert (found.separation[2:] > found.bar).all() and (found.separation[:2] < found.bar).all()
    assert "entropy" in found.definition and "20 and 20 prompts" in found.definition


def test_a_difference_that_closes_again_is_no_divergence():
    found = find_divergence(draw_set(20, 0, np.array([4, 4, 4, 0])), draw_set(20, 1, 0), "entropy")
    assert found.layer is None and found.separation[0] > found.bar


def test_separation_is_the_distance_of_auc_from_a_half():
    first, second = draw_set(5, 0, 1), draw_set(6, 1, 0)
    found = find_divergence(first, second, "entropy", draws=20)
    for layer in range(LAYERS):
        wins = [float(a.entropy[layer, 0] > b.entropy[layer, 0]) for a in first for b in second]
        assert found.separation[layer] == pytest.approx(abs(np.mean(wins) - 0.5))


def test_sets_that_are_alike_pass_the_bar_at_any_layer_in_one_of_twenty():
    passed = 0
    for seed in range(100):
        found = find_divergence(draw_set(8, 2 * seed, 0), draw_set(8, 2 * seed + 1, 0), "entropy", draws=199)
        passed += bool((found.separation > found.bar).any())
    assert passed <= 12


def test_too_few_prompts_cannot_diverge():
    assert find_divergence(draw_set(2, 0, 100), draw_set(2, 1, 0), "entropy").layer is None


def test_sets_that_cannot_be_compared_are_refused():
    first = draw_set(3, 0, 0)
    shorter = [dataclasses.replace(t, layers=t.layers + 1) for t in first]
    with pytest.raises(DataError, match="different layers"):
        find_divergence(first, shorter, "entropy")
    with pytest.raises(DataError, match="missing on some prompts"):
        find_divergence(first, [set_entropy(first[0], [np.nan] * LAYERS)], "entropy")


def named(values):
    return {f"v{i}": float(value) for i, value in enumerate(values)}


@pytest.mark.parametrize("n", [4, 7, 30])
def test_correlation_equals_spearman_and_its_p_counts_reorderings(n):
    rng = np.random.default_rng(n)
    kept, rates = rng.normal(size=n), rng.normal(size=n).round(1)
    found = correlate(named(kept), named(rates))
    assert found.value == pytest.approx(spearmanr(kept, rates).statistic)
    assert found.low < found.value < found.high and f"{n} variants" in found.note
    if n < 8:
        reached = [abs(spearmanr(kept, order).statistic) >= abs(found.value) - 1e-9 for order in permutations(rates)]
        assert found.p == pytest.approx(np.mean(reached))
    else:
        assert found.p == pytest.approx(spearmanr(kept, rates).pvalue, abs=0.03)


def test_intervals_of_correlations_cover():
    rng, rho, covered = np.random.default_rng(0), 0.6, 0
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's of a normal pair
    for _ in range(300):
        pairs = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=10)
        found = correlate(named(pairs[:, 0]), named(pairs[:, 1]))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 300 <= 0.99


def test_a_perfect_order_of_few_points_is_still_wide():
    found = correlate(named([1, 2, 3, 4]), named([0.1, 0.2, 0.3, 0.9]))
    assert found.value == 1 and found.high == 1 and found.low < 0
    assert found.p == pytest.approx(2 / 24)


def test_what_cannot_be_estimated_says_why():
    few = correlate(named([1, 2]), named([1, 2]))
    assert few.value is None and "too few" in few.note and "2 variants" in few.note
    three = correlate(named([1, 2, 3]), named([1, 2, 3]))
    assert three.value == 1 and three.low is None and "no interval" in three.note
    flat = correlate(named([1, 2, 3, 4, 5]), named([0.5] * 5))
    assert flat.value is None and "does not vary" in flat.note
    with pytest.raises(DataError, match="both a kept share and a rate"):
        correlate({"a": math.nan}, {"a": 1.0})


def test_variants_without_a_share_or_a_rate_are_left_out():
    kept = named([1, 2, 3, 4]) | {"none": math.nan, "unasked": 0.5}
    found = correlate(kept, named([1, 3, 2, 4]) | {"none": 0.1})
    assert [name for name, _, _ in found.points] == ["v0", "v1", "v2", "v3"]
