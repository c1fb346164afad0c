"""Statistics against independent implementations, published tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from deltakeeper.evals.stats import (
    bca_bootstrap,
    benjamini_hochberg,
    draw_counts,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_effect,
    non_inferiority_bound,
    paired_bootstrap,
    paired_permutation,
    percentile_estimate,
    resampled_means,
    wilson,
    zero_hit_bound,
)
from deltakeeper.evals.stats.bootstrap import _draw

Z = 1.959963984540054


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(kn):
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(k / n - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_wilson_equals_scipys():
    for k, n in [(0, 10), (3, 64), (64, 64), (57, 520)]:
        assert wilson(k, n) == pytest.approx(tuple(binomtest(k, n).proportion_ci(method="wilson")), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(k, n):
    with pytest.raises(ValueError, match="proportion"):
        wilson(k, n)


@pytest.mark.parametrize(("n", "percent"), [(10, 27.8), (50, 7.1), (100, 3.7), (200, 1.9), (520, 0.73), (1500, 0.26)])
def test_zero_hits_are_bounded_as_tabulated(n, percent):
    assert zero_hit_bound(n) == pytest.approx(Z**2 / (n + Z**2))
    assert 100 * zero_hit_bound(n) == pytest.approx(percent, abs=0.05 if percent > 1 else 0.005)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_statsmodels(lost, gained):
    if lost + gained == 0:
        assert mcnemar_exact(0, 0) == 1
    else:
        expected = mcnemar([[5, lost], [gained, 7]], exact=True).pvalue
        assert mcnemar_exact(lost, gained) == pytest.approx(expected)


def test_five_flips_never_reach_significance_and_six_can():
    assert mcnemar_exact(5, 0) > 0.05 > mcnemar_exact(6, 0)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_benjamini_hochberg_equals_statsmodels(p):
    expected = multipletests(p, method="fdr_bh")[1] if p else []
    assert benjamini_hochberg(p) == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("n", "points"),
    [
        (50, (None, None, 17.6)),
        (100, (None, 8.8, 12.8)),
        (200, (4.4, 6.4, 9.1)),
        (300, (3.7, 5.3, 7.4)),
        (520, (2.8, 4.0, 5.6)),
        (1000, (2.0, 2.9, 4.0)),
    ],
)
def test_detectable_effect_is_as_tabulated(n, points):
    for discordant, expected in zip((0.05, 0.1, 0.2), points, strict=True):
        got = minimum_detectable_effect(n, discordant)
        assert got is None if expected is None else 100 * got == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("n", "power"), [(50, 0.06), (100, 0.26), (200, 0.60), (300, 0.80), (520, 0.97)])
def test_power_is_as_tabulated_for_a_drop_of_five_points(n, power):
    assert mcnemar_power(n, 0.09, 0.05) == pytest.approx(power, abs=0.0051)


def test_power_equals_a_simulation():
    rng = np.random.default_rng(8)
    flips = rng.multinomial(60, [0.22, 0.06, 0.72], size=4000)
    significant = np.mean([mcnemar_exact(lost, gained) < 0.05 for lost, gained, _ in flips.tolist()])
    assert mcnemar_power(60, 0.28, 0.16) == pytest.approx(significant, abs=0.025)


@given(st.integers(6, 300), st.floats(0.01, 1))
def test_detectable_effect_has_the_power_it_claims(n, discordant):
    delta = minimum_detectable_effect(n, discordant)
    if delta is None:
        assert mcnemar_power(n, discordant, discordant) < 0.8
    else:
        assert mcnemar_power(n, discordant, delta) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.05), (50, 0.1), (100, 0.05), (64, 0.0)])
def test_detectable_effect_is_absent_where_it_is_out_of_reach(n, discordant):
    assert minimum_detectable_effect(n, discordant) is None


@pytest.mark.parametrize(("n", "discordant"), [(0, 0.1), (10, 1.1), (10, -0.1)])
def test_detectable_effect_refuses_what_is_no_share(n, discordant):
    with pytest.raises(ValueError, match="share"):
        minimum_detectable_effect(n, discordant)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_counts_draw_as_many_units_as_there_are(n, seed):
    counts = draw_counts(n, resamples=50, seed=seed)
    assert counts.shape == (50, n)
    assert (counts.sum(1) == n).all()
    assert (counts == draw_counts(n, resamples=50, seed=seed)).all()


def test_counts_do_not_depend_on_how_they_are_chunked(monkeypatch):
    whole = draw_counts(7, resamples=100, seed=4)
    monkeypatch.setattr("deltakeeper.evals.stats.bootstrap._CHUNK", 21)
    _draw.cache_clear()
    assert (draw_counts(7, resamples=100, seed=4) == whole).all()


def test_every_unit_is_drawn_once_on_average():
    counts = draw_counts(20, resamples=20_000, seed=1)
    assert counts.mean(0) == pytest.approx(np.ones(20), abs=0.05)
    assert counts.var(0) == pytest.approx(np.full(20, 1 - 1 / 20), abs=0.05)  # binomial(20, 1/20)


def test_clusters_are_drawn_whole():
    clusters = ["a", "b", "a", "c", "b", "a"]
    counts = draw_counts(6, resamples=500, seed=2, clusters=clusters)
    for name in "abc":
        members = counts[:, [i for i, c in enumerate(clusters) if c == name]]
        assert (members == members[:, :1]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()  # three clusters, three draws
    assert len(set(counts.sum(1))) > 1


def test_counts_refuse_bad_arguments():
    with pytest.raises(ValueError, match="at least one"):
        draw_counts(0)
    with pytest.raises(ValueError, match="cluster names"):
        draw_counts(3, clusters=["a"])


def test_resampled_means_equal_a_loop():
    rng = np.random.default_rng(0)
    values, counts = rng.random((3, 9)), draw_counts(9, resamples=20, seed=5, clusters=list("aabbccdde"))
    looped = [[np.repeat(row, c.astype(int)).mean() for c in counts] for row in values]
    assert resampled_means(values, counts) == pytest.approx(np.array(looped))


def test_bootstrap_interval_of_a_mean_has_the_textbook_width():
    x = np.random.default_rng(3).random(200)
    got = paired_bootstrap(lambda counts: resampled_means(x, counts), 200, seed=1)
    half = Z * x.std() / math.sqrt(200)
    assert got.value == pytest.approx(x.mean())
    assert (got.low, got.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


def test_bootstrap_covers_a_paired_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(11)
    n, trials, truth, hits = 80, 300, 0.2, 0
    for trial in range(trials):
        u = rng.random(n)
        x, y = (u < 0.7).astype(float), (u < 0.5).astype(float)
        got = paired_bootstrap(lambda w, d=x - y: resampled_means(d, w), n, resamples=500, seed=trial)
        hits += got.low <= truth <= got.high
    assert beta.ppf(0.001, hits, trials - hits + 1) < 0.95  # not everything is covered by accident
    assert hits / trials > 0.90


def test_cluster_bootstrap_is_wider_where_clusters_agree():
    x = np.repeat(np.random.default_rng(6).random(40), 5)  # 40 clusters of 5 equal prompts
    clusters = [i // 5 for i in range(200)]
    plain = paired_bootstrap(lambda w: resampled_means(x, w), 200, seed=1)
    whole = paired_bootstrap(lambda w: resampled_means(x, w), 200, seed=1, clusters=clusters)
    assert (whole.high - whole.low) / (plain.high - plain.low) == pytest.approx(math.sqrt(5), rel=0.1)


def test_an_estimate_is_absent_where_its_resamples_are_not_finite():
    few = np.append(np.linspace(0, 1, 1000), [np.inf] * 10)
    many = np.append(np.linspace(0, 1, 1000), [np.nan] * 100)
    assert percentile_estimate(0.5, few).low == pytest.approx(0.025, abs=1e-3)
    for absent in (percentile_estimate(0.5, many), percentile_estimate(math.nan, few)):
        assert absent.value is absent.low is absent.high is None
        assert absent.note.startswith("not estimable")


def test_non_inferiority_bound_is_the_upper_end_of_a_one_sided_interval():
    rng = np.random.default_rng(2)
    reference = (rng.random(400) < 0.9).astype(float)
    other = reference * (rng.random(400) < 0.97)
    bound = non_inferiority_bound(reference, other, seed=3)
    loss = 1 - other.mean() / reference.mean()
    counts = draw_counts(400, seed=3)
    draws = 1 - resampled_means(other, counts) / resampled_means(reference, counts)
    assert loss < bound < 0.1
    assert np.mean(draws <= bound) == pytest.approx(0.95, abs=0.01)
    nothing = zero_hit_bound(400, 0.9) / reference.mean()  # what no flip among 400 leaves open, on one side
    assert non_inferiority_bound(reference, reference) == pytest.approx(nothing)
    one = reference.copy()
    one[np.flatnonzero(reference)[0]] = 0
    assert non_inferiority_bound(reference, one) >= nothing + 1 / reference.sum() - 1e-12
    assert non_inferiority_bound(one, reference) > 0
    assert non_inferiority_bound(reference + 5, reference + 5) == pytest.approx(0)  # no shares: no floor
    assert non_inferiority_bound(np.zeros(10), np.ones(10)) is None


def test_bca_equals_scipys():
    rng = np.random.default_rng(21)
    x = rng.exponential(size=60)
    reference = bootstrap((x,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(1))
    got = bca_bootstrap(lambda counts: resampled_means(x, counts), 60, seed=3)
    expected = reference.confidence_interval
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.03)
    plain = paired_bootstrap(lambda counts: resampled_means(x, counts), 60, seed=3)
    assert got.high > plain.high + 0.01  # the skew moves both ends up
    assert got.low > plain.low


def test_bca_leaves_out_whole_clusters():
    x = np.random.default_rng(22).exponential(size=20)
    one = bca_bootstrap(lambda counts: resampled_means(x, counts), 20, seed=3)
    clusters = [i // 3 for i in range(60)]
    three = bca_bootstrap(lambda counts: resampled_means(np.repeat(x, 3), counts), 60, seed=3, clusters=clusters)
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    assert bca_bootstrap(lambda counts: counts.sum(1), 5, clusters=[1] * 5).value is None


SHORT = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=9)


@settings(max_examples=30)
@given(SHORT)
def test_permutation_equals_scipys_exact_one(pairs):
    one, other = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))

    def mean_gap(x, y, axis):
        return np.mean(x - y, axis=axis)

    reference = permutation_test((one, other), mean_gap, permutation_type="samples", n_resamples=np.inf)
    # scipy doubles the smaller tail; the statistic is symmetric, so both agree up to ties at the centre
    assert paired_permutation(one, other) == pytest.approx(reference.pvalue)


def test_permutation_of_events_equals_mcnemar():
    tuned, served = np.array([1.0] * 20 + [0.0] * 3 + [1.0] * 5), np.array([0.0] * 8 + [1.0] * 20)
    lost, gained = int(((tuned == 1) & (served == 0)).sum()), int(((tuned == 0) & (served == 1)).sum())
    assert paired_permutation(tuned, served) == pytest.approx(mcnemar_exact(lost, gained))


def test_random_permutations_come_near_the_exact_value(monkeypatch):
    rng = np.random.default_rng(23)
    one, other = rng.random(12) + 0.12, rng.random(12)
    exact = paired_permutation(one, other)
    monkeypatch.setattr("deltakeeper.evals.stats.significance._EXACT", 4)
    assert paired_permutation(one, other, resamples=20_000, seed=5) == pytest.approx(exact, abs=0.012)


def test_permutation_exchanges_clusters_whole():
    x = np.random.default_rng(24).random(6)
    clusters = [i // 4 for i in range(24)]
    alone = paired_permutation(x, np.zeros(6))
    assert paired_permutation(np.repeat(x, 4), np.zeros(24), clusters=clusters) == pytest.approx(alone) == 2 / 64
    assert paired_permutation(np.ones(4), np.ones(4)) == 1
    with pytest.raises(ValueError, match="cluster names"):
        paired_permutation(np.ones(4), np.ones(4), clusters=[1])
