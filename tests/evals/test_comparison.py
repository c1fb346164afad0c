"""Comparisons against brute force over prompts, and the cases in which nothing can be estimated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.errors import DataError
from deltakeeper.evals.comparison import (
    OUTCOMES,
    Arms,
    flip_table,
    mitigation,
    pair,
    perplexity_ratio,
    retention,
    selectivity,
    transition_table,
    utility_loss,
)
from deltakeeper.evals.stats import mcnemar_exact, wilson, zero_hit_bound

FEW = 400
TRIPLES = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40)


def events(hits: int, n: int, first: int = 0) -> dict[str, bool]:
    """`hits` consecutive prompts of `n` with the event, beginning at `first`."""
    return {f"p{i:03d}": first <= i < first + hits for i in range(n)}


def arms(base: int, tuned: int, served: int, n: int = 100) -> Arms:
    return Arms(events(base, n), events(tuned, n), events(served, n))


def arms_of(triples) -> Arms:
    columns = zip(*triples, strict=True)
    return Arms(*({f"p{i}": value for i, value in enumerate(column)} for column in columns))


@given(TRIPLES)
def test_flip_table_counts_each_prompt_once(triples):
    a = arms_of(triples)
    table = flip_table(a.tuned, a.served)
    pairs = [(f, c) for _, f, c in triples]
    counted = (table.kept, table.lost, table.gained, table.never)
    assert counted == tuple(pairs.count(x) for x in [(True, True), (True, False), (False, True), (False, False)])
    assert table.n == len(triples)
    assert table.net == sum(f for f, _ in pairs) - sum(c for _, c in pairs)
    assert set(table.gained_ids) == {f"p{i}" for i, x in enumerate(pairs) if x == (False, True)}
    assert set(table.lost_ids) == {f"p{i}" for i, x in enumerate(pairs) if x == (True, False)}
    assert table.p == mcnemar_exact(table.lost, table.gained)
    assert table.gained_interval == wilson(table.gained, table.n)


def test_flip_table_pairs_by_id_and_not_by_order():
    tuned = {"a": True, "b": False, "c": True}
    table = flip_table(tuned, dict(reversed([("a", True), ("b", True), ("c", False)])))
    assert (table.kept, table.gained_ids, table.lost_ids) == (1, ("b",), ("c",))


def test_detectable_effect_uses_the_zero_hit_bound_where_nothing_flipped():
    same = events(30, 1000)
    assert flip_table(same, same).detectable is None  # .4 % of flips at most: no difference could be shown
    assert 0 < flip_table(events(300, 1000), events(250, 1000)).detectable <= 0.05


@pytest.mark.parametrize("bad", [{"a": True}, {"a": True, "b": True, "c": True}, {}])
def test_arms_with_other_prompts_are_refused(bad):
    with pytest.raises(DataError, match="prompt"):
        pair([{"a": True, "b": False}, bad])
    with pytest.raises(DataError, match="no prompts"):
        pair([{}, bad])


@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)), min_size=1, max_size=40))
def test_transitions_count_each_prompt_once(pairs):
    tuned, served = ({f"p{i}": pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    table = transition_table(tuned, served)
    assert {(f, c): table[f][c] for f in OUTCOMES for c in OUTCOMES} == {
        (f, c): pairs.count((f, c)) for f in OUTCOMES for c in OUTCOMES
    }


def test_transitions_refuse_an_unknown_outcome():
    with pytest.raises(DataError, match="'maybe'"):
        transition_table({"a": "refused"}, {"a": "maybe"})
    with pytest.raises(DataError, match="'maybe'"):
        transition_table({"a": "maybe"}, {"a": "refused"})


@given(TRIPLES)
def test_point_values_are_the_definitions(triples):
    a = arms_of(triples)
    b, f, c = (sum(column) / len(triples) for column in zip(*triples, strict=True))
    got, loss, left = mitigation(a, resamples=FEW), utility_loss(a, resamples=FEW), retention(a, resamples=FEW)
    assert got.absolute.value == pytest.approx(f - c)
    for estimate, expected in [
        (got.relative, (f - c) / f if f else None),
        (got.recovered, (f - c) / (f - b) if f - b >= 0.05 else None),
        (left, (c - b) / (f - b) if f > b else None),
        (loss.versus_tuned, 1 - c / f if f else None),
        (loss.versus_base, 1 - c / b if b else None),
    ]:
        if estimate.value is None:
            assert estimate.low is estimate.high is None
            assert estimate.note
        else:
            assert estimate.value == pytest.approx(expected)
            assert estimate.low <= estimate.high


def test_mitigation_of_a_clear_case():
    got = mitigation(arms(2, 90, 30), seed=1)
    assert (got.absolute.value, got.relative.value, got.recovered.value) == pytest.approx((0.6, 60 / 90, 60 / 88))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (got.absolute.low, got.absolute.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)
    assert got.relative.low < got.relative.value < got.relative.high


def test_retention_and_recovered_fraction_add_up_to_one():
    a = arms(2, 90, 30)
    recovered, left = mitigation(a).recovered, retention(a)
    assert left.value == pytest.approx(1 - recovered.value)
    assert (left.low, left.high) == pytest.approx((1 - recovered.high, 1 - recovered.low))


def test_ratios_are_not_clipped():
    assert retention(arms(10, 60, 80)).value == pytest.approx(1.4)
    assert retention(arms(30, 80, 10)).value == pytest.approx(-0.4)


@pytest.mark.parametrize("tuned", [0, 4])
def test_a_fine_tune_that_did_nothing_has_no_recovered_fraction(tuned):
    got = mitigation(arms(0, tuned, 0))
    assert got.recovered.value is None
    assert "5 points" in got.recovered.note


def test_a_fine_tune_that_went_the_other_way_has_no_retention():
    assert retention(arms(60, 20, 40)).value is None
    assert mitigation(arms(60, 20, 40)).recovered.value is None


def test_retention_is_absent_below_the_detectable_effect():
    noisy = Arms(events(40, 100), events(46, 100, first=40), events(40, 100))  # 6 points apart, 86 prompts flipped
    assert "zero in too many" in mitigation(noisy).recovered.note
    assert retention(noisy).value is None
    assert "this many prompts" in retention(noisy).note


def test_no_flip_still_leaves_room_for_some():
    got = mitigation(arms(0, 50, 50)).absolute
    assert (got.value, got.low, got.high) == (0, -zero_hit_bound(100), zero_hit_bound(100))
    assert got.note


def test_a_few_flips_know_no_more_than_none():
    bound = zero_hit_bound(100)
    one = arms(0, 90, 89)
    got, loss = mitigation(one), utility_loss(one)
    for estimate, half in (
        (got.absolute, bound),
        (got.relative, bound / 0.9),
        (got.recovered, bound / 0.9),
        (loss.versus_tuned, bound / 0.9),
        (retention(one), bound / 0.9),
    ):
        assert estimate.low <= estimate.value - half + 1e-12
        assert estimate.high >= estimate.value + half - 1e-12
    same = selectivity(arms(0, 90, 89), arms(0, 90, 90)).difference
    assert same.low < 0 < same.high
    clusters = {id: int(id[1:]) // 5 for id in one.base}
    assert mitigation(one, clusters=clusters).absolute.high >= zero_hit_bound(20)


def test_selectivity_is_skill_left_minus_attack_left():
    got = selectivity(arms(2, 90, 30), arms(0, 80, 76, n=90), seed=1)
    attack, skill = 28 / 88, 76 / 80
    assert (got.attack.value, got.skill.value) == pytest.approx((attack, skill))
    assert got.difference.value == pytest.approx(skill - attack)
    assert 0 < got.difference.low < got.difference.value < got.difference.high


def test_the_two_prompt_sets_are_resampled_apart():
    """Equal sets, drawn by one stream, would cancel to a width of zero; apart, variances add up."""
    a = arms(2, 90, 30)
    got = selectivity(a, a, seed=1)
    width = got.difference.high - got.difference.low
    assert width == pytest.approx(math.sqrt(2) * (got.attack.high - got.attack.low), rel=0.1)


@pytest.mark.parametrize("absent", ["attack", "skill"])
def test_selectivity_says_which_retention_is_absent(absent):
    nothing, clear = arms(1, 1, 1), arms(0, 90, 30)
    got = selectivity(*((nothing, clear) if absent == "attack" else (clear, nothing)))
    assert got.difference.value is None
    assert got.difference.note.startswith(f"{absent} not estimable")


def test_clusters_widen_the_interval_and_must_cover_all_prompts():
    n = 100
    tuned = {f"p{i:03d}": True for i in range(n)}
    served = {f"p{i:03d}": i // 5 % 2 == 0 for i in range(n)}
    a = Arms(dict.fromkeys(tuned, False), tuned, served)
    plain = mitigation(a).absolute
    whole = mitigation(a, clusters={id: int(id[1:]) // 5 for id in tuned}).absolute
    assert whole.high - whole.low > 1.5 * (plain.high - plain.low)
    with pytest.raises(DataError, match="no cluster"):
        mitigation(a, clusters={"p000": 1})


def test_perplexity_ratio_is_paired_over_passages():
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 80, size=16)
    tuned = rng.uniform(1, 6, size=16) * tokens  # passages differ by far more than the models do
    served = tuned + 0.1 * tokens + rng.normal(0, 0.5, size=16)
    got = perplexity_ratio(tuned, served, tokens)
    assert got.value == pytest.approx(math.exp(served.sum() / tokens.sum()) / math.exp(tuned.sum() / tokens.sum()))
    assert 1.08 < got.low < got.value < got.high < 1.13


def test_perplexity_ratio_refuses_other_passages():
    with pytest.raises(DataError, match="same passages"):
        perplexity_ratio([1.0, 2.0], [1.0], [3, 4])
    with pytest.raises(DataError, match="same passages"):
        perplexity_ratio([], [], [])


def test_equal_arguments_give_equal_estimates():
    a = arms(2, 90, 30)
    assert mitigation(a, seed=4) == mitigation(a, seed=4) != mitigation(a, seed=5)
