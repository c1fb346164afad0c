"""Seeds × prompts: against brute force over drawn indices, textbook variances, and coverage in a known model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, t, ttest_1samp

from deltakeeper.evals.stats import CrossedSample, crossed_estimate, detectable_effect, draw_counts, two_sided_p
from deltakeeper.evals.stats.crossed import _STREAM, _draw_means


def first(x):
    return x[0]


def sample(values, clusters=None):
    values = np.asarray(values, dtype=np.float64)
    return CrossedSample(values[None] if values.ndim == 2 else values, clusters)


def test_draws_equal_a_loop_over_drawn_seeds_and_clusters():
    rng = np.random.default_rng(0)
    values, clusters = rng.random((2, 3, 5)), ("a", "b", "a", "c", "b")
    (got,) = _draw_means([sample(values, clusters)], seed=4, resamples=25)
    seeds = draw_counts(3, resamples=25, seed=4 + _STREAM).astype(int)
    prompts = draw_counts(5, resamples=25, seed=4, clusters=clusters).astype(int)
    for k in range(25):
        rows, columns = np.repeat(range(3), seeds[k]), np.repeat(range(5), prompts[k])
        assert got[:, k] == pytest.approx(values[:, rows][:, :, columns].mean((1, 2)))


def test_error_of_a_balanced_layout_equals_the_mean_squares_of_a_two_way_anova():
    y = np.random.default_rng(1).normal(size=(4, 9)) + np.arange(4)[:, None] + np.arange(9)
    _, spread = crossed_estimate(first, [sample(y)], resamples=50)
    rows, columns, all_ = y.mean(1), y.mean(0), y.mean()
    ms_rows = 9 * ((rows - all_) ** 2).sum() / 3
    ms_columns = 4 * ((columns - all_) ** 2).sum() / 8
    ms_rest = ((y - rows[:, None] - columns + all_) ** 2).sum() / 24
    assert spread.error**2 == pytest.approx((ms_rows + ms_columns - ms_rest) / 36)


def test_one_prompt_or_one_seed_leaves_a_plain_t_interval():
    y = np.random.default_rng(2).normal(size=12)
    for values in (y[:, None], y[None, :]):
        got, spread = crossed_estimate(first, [sample(values)], seed=1)
        assert spread.error == pytest.approx(y.std(ddof=1) / math.sqrt(12))
        assert spread.freedom == pytest.approx(11)
        half = t.ppf(0.975, 11) * spread.error
        assert (got.low, got.high) == pytest.approx((y.mean() - half, y.mean() + half), abs=0.12 * half)
        assert two_sided_p(float(got.value), spread) == pytest.approx(ttest_1samp(y, 0).pvalue)


def test_seeds_that_repeat_each_other_add_nothing():
    """Three equal fine-tunes are one fine-tune: nested resampling would report a width smaller by the root of three."""
    row = (np.random.default_rng(3).random(80) < 0.4).astype(float)
    one, _ = crossed_estimate(first, [sample(row[None])], seed=1)
    three, spread = crossed_estimate(first, [sample(np.repeat(row[None], 3, 0))], seed=1)
    assert spread.of_seeds == pytest.approx(0)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.02)


def test_clusters_of_equal_prompts_count_once():
    row = np.random.default_rng(4).random((3, 20))
    apart, _ = crossed_estimate(first, [sample(row)], seed=1)
    together = sample(np.repeat(row, 4, 1), tuple(i // 4 for i in range(80)))
    whole, _ = crossed_estimate(first, [together], seed=1)
    assert (whole.low, whole.value, whole.high) == pytest.approx((apart.low, apart.value, apart.high))


def test_two_prompt_sets_share_their_seeds():
    """What a seed does to both sets cancels in their difference, or adds up in their sum."""
    rng = np.random.default_rng(5)
    shift = rng.normal(0, 1, size=(6, 1))
    a, b = shift + rng.normal(0, 0.1, (6, 30)), shift + rng.normal(0, 0.1, (6, 40))
    minus = crossed_estimate(lambda x, y: x[0] - y[0], [sample(a), sample(b)])[1].error
    plus = crossed_estimate(lambda x, y: x[0] + y[0], [sample(a), sample(b)])[1].error
    assert minus < 0.1 * plus
    assert plus == pytest.approx(2 * shift.std(ddof=1) / math.sqrt(6), rel=0.05)
    with pytest.raises(ValueError, match="same seeds"):
        crossed_estimate(lambda x, y: x[0] - y[0], [sample(a), sample(b[:5])])


def test_ends_are_cut_at_what_the_quantity_can_be():
    y = np.tile([1.0, 1.0, 1.0, 0.0], (4, 3))
    got, _ = crossed_estimate(first, [sample(y)], bounds=(0.0, 0.8))
    assert got.high == 0.8


def test_detectable_effect_has_the_power_it_claims():
    rng = np.random.default_rng(6)
    y = rng.normal(size=(1, 15))
    _, spread = crossed_estimate(first, [sample(y)], resamples=20)
    effect = detectable_effect(spread) / spread.error / math.sqrt(15)
    found = np.mean([ttest_1samp(rng.normal(effect, 1, 15), 0).pvalue < 0.05 for _ in range(1500)])
    assert found == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 0.0), (0.8, 1.5)])
def test_the_interval_covers_a_retention_about_as_often_as_it_says(seeds, of_seeds, of_prompts):
    rng = np.random.default_rng([seeds, int(of_prompts)])
    trials, hits = 150, 0

    def rates(a, b):
        return [1 / (1 + np.exp(-(shift + slope * (a + b)))) for shift, slope in ((1.5, 0.5), (-0.3, 1.0))]

    def kept(x):
        return (x[2] - x[0]) / (x[1] - x[0])

    f, c = (p.mean() for p in rates(rng.normal(0, of_seeds, 400_000), rng.normal(0, of_prompts, 400_000)))
    truth = (c - 0.1) / (f - 0.1)
    for trial in range(trials):
        p_tuned, p_served = rates(rng.normal(0, of_seeds, (seeds, 1)), rng.normal(0, of_prompts, (1, 60)))
        base = np.broadcast_to(rng.random(60) < 0.1, p_tuned.shape)
        arms = np.stack([base, rng.random(p_tuned.shape) < p_tuned, rng.random(p_tuned.shape) < p_served])
        got, _ = crossed_estimate(kept, [sample(arms.astype(float))], seed=trial, resamples=300)
        hits += got.low <= truth <= got.high
    assert beta.ppf(0.0005, hits, trials - hits + 1) < 0.95 < beta.ppf(0.9995, hits + 1, trials - hits)
