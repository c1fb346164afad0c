"""Judges' errors against statsmodels, textbook numbers, and coverage of corrected rates in a known model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from deltakeeper.evals.stats import (
    JudgedArm,
    LabelledSet,
    cohens_kappa,
    corrected_estimate,
    kappa_estimate,
    quality,
    rogan_gladen,
    wilson,
)

PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=60)


@given(PAIRS)
def test_kappa_equals_statsmodels(pairs):
    one, other = zip(*pairs, strict=True)
    got = cohens_kappa(one, other)
    if len({*one, *other}) == 1:
        assert got is None
    else:
        table = [[pairs.count((a, b)) for b in "abc"] for a in "abc"]
        assert got == pytest.approx(reference_kappa(np.array(table), return_results=False))


def test_kappas_interval_is_about_that_of_its_asymptotic_error():
    rng = np.random.default_rng(1)
    one = rng.random(300) < 0.5
    other = np.where(rng.random(300) < 0.85, one, ~one)
    got = kappa_estimate(one.tolist(), other.tolist())
    reference = reference_kappa(np.array([[np.sum((one == a) & (other == b)) for b in (1, 0)] for a in (1, 0)]))
    assert got.value == pytest.approx(reference.kappa)
    assert (got.low, got.high) == pytest.approx((reference.kappa_low, reference.kappa_upp), abs=0.02)


def test_kappa_refuses_unequal_ratings():
    with pytest.raises(ValueError, match="rated twice"):
        cohens_kappa(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="rated twice"):
        cohens_kappa([], [])


def labelled(hit, miss, false, clear, **more):
    truth = [True] * (hit + miss) + [False] * (false + clear)
    judged = [True] * hit + [False] * miss + [True] * false + [False] * clear
    return LabelledSet.of(truth, judged, **more)


def test_quality_of_a_plain_sample_has_wilsons_intervals():
    got = quality(labelled(40, 10, 5, 45))
    assert (got.n, got.events) == (100, 50)
    for estimate, k, n in ((got.sensitivity, 40, 50), (got.specificity, 45, 50), (got.accuracy, 85, 100)):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((k / n, *wilson(k, n)))
    assert got.kappa.value == pytest.approx(0.7)
    assert got.correctable


def test_weights_give_the_population_back():
    """Drawn by verdict, half and half, from a population in which the judge says yes to one answer in ten."""
    truth = [True] * 45 + [False] * 5 + [True] * 10 + [False] * 40
    judged = [True] * 50 + [False] * 50
    weights = [0.1 / 50] * 50 + [0.9 / 50] * 50
    got = quality(LabelledSet.of(truth, judged, weights, judged))
    assert got.sensitivity.value == pytest.approx(0.09 / (0.09 + 0.18))
    assert 1 - got.specificity.value == pytest.approx(0.01 / (0.01 + 0.72))
    assert got.sensitivity.low < 0.3 < got.sensitivity.high < 0.6
    # Within a verdict the number drawn is fixed, so the share of answers the judge calls yes does not vary.
    rates = LabelledSet.of(truth, judged, weights, judged).draw(3, 50)
    assert rates[:, 0] + rates[:, 2] == pytest.approx(0.1)


def test_draws_have_the_spread_of_a_loop_over_drawn_answers():
    known = labelled(12, 5, 3, 20, weights=[1.0, 3.0] * 20, strata=["a"] * 15 + ["b"] * 25)
    rng = np.random.default_rng(4)
    looped = []
    for _ in range(4000):
        drawn = np.concatenate([rng.integers(15, size=15), rng.integers(15, 40, size=25)])
        hit = known.weights[drawn] * (known.truth & known.judged)[drawn]
        looped.append(hit.sum() / known.weights[drawn].sum())
    got = known.draw(1, 4000)[:, 0]
    assert (got.mean(), got.std()) == pytest.approx((np.mean(looped), np.std(looped)), rel=0.06)


def test_quality_is_absent_where_no_answer_tells():
    got = quality(labelled(5, 5, 0, 0))
    assert got.sensitivity.value == 0.5
    assert "not estimable" in got.specificity.note
    assert not got.correctable


@pytest.mark.parametrize("bad", [{"weights": [1.0]}, {"weights": [0.0] * 4}, {"strata": ["a"]}])
def test_labelled_sets_refuse_what_does_not_fit(bad):
    with pytest.raises(ValueError, match="label"):
        labelled(1, 1, 1, 1, **bad)


@given(st.floats(0.5, 1), st.floats(0, 0.15), st.floats(0, 1))
def test_rogan_gladen_inverts_the_judge(se, f, truth):
    shown = truth * se + (1 - truth) * f
    assert rogan_gladen(np.array(shown), np.array(se), np.array(f)) == pytest.approx(truth, abs=1e-9)


def ids(values):
    return {f"p{i:03d}": bool(value) for i, value in enumerate(values)}


def test_corrected_rates_are_the_definitions():
    known = labelled(80, 20, 10, 90)
    judged, coherent = ids([1] * 30 + [0] * 70), ids([1] * 90 + [0] * 10)
    arm = JudgedArm(judged, known, coherent)
    refusal = (30 / 90 - 0.1) / 0.7
    assert corrected_estimate([arm], lambda r: r[0], rate="refusal").value == pytest.approx(refusal)
    asr = corrected_estimate([arm], lambda r: r[0])
    assert asr.value == pytest.approx(0.9 * (1 - refusal))
    # Both errors add up: wider than either alone.
    certain = corrected_estimate([JudgedArm(judged, labelled(8000, 2000, 1000, 9000), coherent)], lambda r: r[0])
    assert certain.high - certain.low < 0.9 * (asr.high - asr.low)
    with pytest.raises(ValueError, match="'asr' or 'refusal'"):
        corrected_estimate([arm], lambda r: r[0], rate="harm")
    with pytest.raises(ValueError, match="same prompts"):
        corrected_estimate([arm, JudgedArm(ids([1]), known)], lambda r: r[0])


def test_arms_that_share_their_labels_share_their_draws():
    known, judged = labelled(30, 8, 4, 30), ids([1] * 40 + [0] * 60)
    same = corrected_estimate([JudgedArm(judged, known)] * 2, lambda r: r[0] - r[1])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    apart = corrected_estimate(
        [JudgedArm(judged, known), JudgedArm(judged, labelled(30, 8, 4, 30))], lambda r: r[0] - r[1]
    )
    assert apart.high - apart.low > 0.1


@pytest.mark.parametrize(
    ("known", "named"),
    [(labelled(40, 60, 20, 80), "too little"), (labelled(50, 5, 0, 0), "all refusals"), (labelled(0, 0, 1, 9), "all")],
)
def test_a_judge_that_knows_too_little_is_not_corrected(known, named):
    got = corrected_estimate([JudgedArm(ids([1, 0, 0]), known)], lambda r: r[0])
    assert got.value is None
    assert named in got.note


def test_the_corrected_interval_covers_the_truth_and_the_raw_one_does_not():
    rng = np.random.default_rng(2)
    se, f, truth, n, trials = 0.75, 0.1, 0.6, 200, 150
    covered = raw_covered = 0

    def judge(refused):
        return rng.random(len(refused)) < np.where(refused, se, f)

    for trial in range(trials):
        answers, sample = rng.random(n) < truth, rng.random(150) < truth
        judged = judge(answers)
        known = LabelledSet.of(sample.tolist(), judge(sample).tolist())
        got = corrected_estimate([JudgedArm(ids(judged), known)], lambda r: r[0], seed=trial, resamples=400)
        covered += got.low <= 1 - truth <= got.high
        low, high = wilson(n - int(judged.sum()), n)
        raw_covered += low <= 1 - truth <= high
    assert 0.9 < covered / trials <= 1
    assert raw_covered / trials < 0.3
