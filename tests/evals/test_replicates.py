"""Arms over seeds: definitions by brute force, agreement with one seed's functions, and what cannot be estimated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import DataError
from deltakeeper.evals import comparison, replicates
from deltakeeper.evals.replicates import ReplicatedArms
from deltakeeper.evals.stats import zero_hit_bound

FEW = 200


def runs(*rows):
    """One row of events a seed."""
    return {seed: {f"p{i:03d}": value for i, value in enumerate(row)} for seed, row in enumerate(rows)}


def drawn(seed, shares, seeds=3, n=100):
    """Random arms in which the event's share is about as given, by one latent number a prompt."""
    rng = np.random.default_rng(seed)
    latent = rng.random(n)
    return ReplicatedArms(
        *(runs(*(((latent + rng.normal(0, 0.1, n)) < share).tolist() for _ in range(seeds))) for share in shares)
    )


def constant(hits, n=100, seeds=3):
    return runs(*[[i < hits for i in range(n)]] * seeds)


CUBES = st.integers(1, 3).flatmap(
    lambda seeds: st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=seeds, max_size=seeds),
            min_size=3,
            max_size=3,
        )
    )
)


@settings(max_examples=50)
@given(CUBES)
def test_values_are_the_definitions_on_mean_rates(cube):
    b, f, c = (float(np.mean(arm)) for arm in cube)
    got = replicates.mitigation(ReplicatedArms(*(runs(*arm) for arm in cube)), resamples=FEW)
    assert got.absolute.value == pytest.approx(f - c)
    assert got.absolute.low <= got.absolute.value <= got.absolute.high
    if got.relative.estimable:
        assert got.relative.value == pytest.approx((f - c) / f)
    else:
        assert got.relative.note.startswith("not estimable")
    assert (
        got.recovered.value is None
        if f - b < 0.05
        else got.recovered.value
        in (
            None,
            pytest.approx((f - c) / (f - b)),
        )
    )


def test_one_seed_agrees_with_the_comparison_of_one_seed():
    arms = drawn(1, (0.05, 0.9, 0.4), seeds=1, n=300)
    plain, over = comparison.mitigation(arms.at(0)), replicates.mitigation(arms)
    for name in ("absolute", "relative", "recovered"):
        one, many = getattr(plain, name), getattr(over, name)
        assert many.value == pytest.approx(one.value)
        assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=0.006)
        assert "one seed" in many.note
    left, kept = comparison.retention(arms.at(0)), replicates.retention(arms)
    assert (kept.value, kept.low, kept.high) == pytest.approx((left.value, left.low, left.high), abs=0.006)


def test_each_seed_stands_beside_the_pool():
    arms = drawn(2, (0.05, 0.9, 0.4))
    got = replicates.retention(arms, resamples=FEW)
    assert list(got.by_seed) == [0, 1, 2]
    for seed, estimate in got.by_seed.items():
        alone = {arm: getattr(arms, arm)[seed] for arm in ("base", "tuned", "served")}
        b, f, c = (np.mean(list(scores.values())) for scores in alone.values())
        assert estimate.value == pytest.approx((c - b) / (f - b))
        assert estimate.note == ""
    assert "3 seeds" in got.note
    assert json.loads(json.dumps(got.to_json()))["by_seed"]["2"]["value"] == pytest.approx(got.by_seed[2].value)


def test_seeds_that_disagree_widen_the_interval():
    alike = ReplicatedArms(constant(0), constant(90), constant(45))
    apart = ReplicatedArms(constant(0), constant(90), runs(*([i < hits for i in range(100)] for hits in (20, 45, 70))))
    one, other = replicates.retention(alike), replicates.retention(apart)
    assert one.value == other.value == pytest.approx(0.5)
    assert other.high - other.low > 3 * (one.high - one.low)
    assert other.by_seed[0].value == pytest.approx(20 / 90)


def test_p_values_and_detectable_effects_are_about_the_difference():
    clear, none = drawn(3, (0.0, 0.9, 0.3), seeds=5), drawn(13, (0.0, 0.6, 0.6), seeds=5)
    found, nothing = (replicates.mitigation(arms, resamples=FEW).absolute for arms in (clear, none))
    assert found.p < 1e-6
    assert nothing.p > 0.05
    assert abs(nothing.value) < nothing.detectable < 0.2
    same = replicates.difference(clear.tuned, clear.tuned)
    assert (same.value, same.p, same.high) == (0, 1, zero_hit_bound(100))


def test_what_never_varies_is_bounded_as_zero_hits_are():
    bound = zero_hit_bound(100)
    gone = replicates.mitigation(ReplicatedArms(constant(0), constant(100), constant(0)))
    assert (gone.relative.low, gone.relative.high) == (pytest.approx(1 - bound), 1)
    assert "zero hits" in gone.relative.note
    assert gone.absolute.p < 1e-6
    left = replicates.retention(ReplicatedArms(constant(0), constant(100), constant(0)))
    assert (left.low, left.high) == pytest.approx((-bound, bound))
    none = replicates.rate(constant(0))
    assert (none.low, none.high) == (0, pytest.approx(bound))


def turned(hits, flips, n=100, seeds=3):
    """Events of the first `hits` prompts; under the first seed the first `flips` of them are lost."""
    return runs(*([(i < hits) and not (seed == 0 and i < flips) for i in range(n)] for seed in range(seeds)))


@pytest.mark.parametrize("flips", [1, 2, 3])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_few_flips_know_no_more_than_none(flips, seeds):
    """One lost answer is no better ground than none: each side reaches as far as that of zero flips."""
    bound = zero_hit_bound(100)
    arms = ReplicatedArms(*(constant(hits, seeds=seeds) for hits in (0, 90)), turned(90, flips, seeds=seeds))
    loss, found = replicates.utility_loss(arms), replicates.mitigation(arms)
    refused = replicates.difference(arms.tuned, arms.served)
    kept = replicates.retention(arms)
    for estimate, half in ((loss.versus_tuned, bound / 0.9), (found.relative, bound / 0.9), (kept, bound / 0.9)):
        assert estimate.low <= estimate.value - half + 1e-12
        assert estimate.high >= estimate.value + half - 1e-12
    for estimate in (found.absolute, refused):
        assert estimate.low <= estimate.value - bound + 1e-12 < estimate.value + bound <= estimate.high + 1e-12
        assert estimate.p > 0.05 and estimate.detectable >= bound
    none = replicates.utility_loss(ReplicatedArms(arms.base, arms.tuned, arms.tuned))
    assert loss.bound >= none.bound + loss.versus_tuned.value - 1e-12
    assert not loss.shown_within(0.02)
    gained = replicates.utility_loss(ReplicatedArms(arms.base, arms.served, arms.tuned))
    assert gained.bound > 0


def test_a_flip_of_the_attack_does_not_narrow_what_is_read_beside_the_skill():
    skill = drawn(5, (0.05, 0.9, 0.7))
    still = replicates.selectivity(ReplicatedArms(constant(0), constant(100), constant(0)), skill).difference
    one = replicates.selectivity(ReplicatedArms(constant(0), constant(100), constant(1)), skill).difference
    assert one.high - one.low > 0.98 * (still.high - still.low)
    shrunk = {0.5: (constant(100), constant(90))}
    attack = ReplicatedArms(constant(0), constant(100), constant(100))
    codec = ReplicatedArms(constant(0), constant(95), turned(95, 1))
    gain = replicates.gain_over_shrinking(attack, codec, shrunk).gain
    assert gain.low < 0 < gain.high


def test_a_rate_of_one_hit_reaches_as_far_as_that_of_none():
    assert replicates.rate(turned(1, 1)).high >= replicates.rate(constant(0)).high
    assert replicates.rate(constant(1, seeds=1)).high >= 0.01 + zero_hit_bound(100)


def test_scores_without_a_scale_have_no_floor():
    """Nats differ on every passage as soon as the model does; what zero hits allow is a share."""
    nats = np.random.default_rng(14).normal(0.01, 0.001, (1, 50))
    found = replicates.rate(runs(*nats))
    assert found.high - found.low < 0.002


def test_flips_that_a_t_test_would_believe_are_held_to_the_sign_test():
    one, other = constant(4), runs(*([i < 4 and i != seed for i in range(100)] for seed in range(3)))
    assert replicates.sign_test(one, other) == pytest.approx(0.25)  # three prompts turned, all one way
    clusters = {f"p{i:03d}": i // 2 for i in range(100)}
    assert replicates.sign_test(one, other, clusters) == pytest.approx(0.5)  # two clusters
    assert replicates.sign_test(one, one) == 1


def test_selectivity_carries_the_attack_that_never_came_back():
    """The attack is gone on every prompt; its zero width must not pass for knowledge in the difference."""
    attack = ReplicatedArms(constant(0), constant(100), constant(0))
    skill = drawn(5, (0.05, 0.9, 0.7))
    got = replicates.selectivity(attack, skill)
    width, alone = (x.high - x.low for x in (got.difference, got.skill))
    assert got.difference.value == pytest.approx(got.skill.value)
    assert width == pytest.approx(math.hypot(alone, 2 * zero_hit_bound(100)), abs=0.01)


def test_selectivity_says_which_retention_is_absent():
    clear, nothing = drawn(6, (0.05, 0.9, 0.4)), ReplicatedArms(constant(5), constant(6), constant(5))
    got = replicates.selectivity(clear, nothing, resamples=FEW)
    assert got.attack.estimable
    assert not got.difference.estimable
    assert got.difference.p is None
    assert "differ by less" in got.difference.note


def test_selectivity_draws_the_same_seeds_for_attack_and_skill():
    hits = [[i < k for i in range(100)] for k in (30, 45, 60, 75)]
    arms = ReplicatedArms(constant(0, seeds=4), constant(100, seeds=4), runs(*hits))
    got = replicates.selectivity(arms, arms)
    assert got.difference.value == pytest.approx(0)
    # Seeds cancel (they move both alike); what remains is the chance of two prompt sets.
    assert got.difference.high - got.difference.low < 0.75 * (got.attack.high - got.attack.low)


def test_utility_loss_is_bounded_on_one_side():
    arms = drawn(7, (0.2, 0.9, 0.88), seeds=5, n=300)
    got = replicates.utility_loss(arms)
    b, f, c = (np.mean([list(s.values()) for s in arm.values()]) for arm in (arms.base, arms.tuned, arms.served))
    assert got.versus_tuned.value == pytest.approx(1 - c / f)
    assert got.versus_base.value == pytest.approx(1 - c / b)
    assert got.versus_tuned.value < got.bound < got.versus_tuned.high
    assert got.shown_within(0.1)
    assert not got.shown_within(got.versus_tuned.value)


def test_scores_need_not_be_events():
    rng = np.random.default_rng(8)
    base = rng.random((3, 40))
    arms = ReplicatedArms(runs(*base), runs(*(base + 1)), runs(*(base + rng.normal(0.5, 0.05, (3, 40)))))
    got = replicates.retention(arms)
    assert got.value == pytest.approx(0.5, abs=0.02)
    assert got.high - got.low < 0.1


def shrunk_arms(kept, hits=100, n=100):
    return constant(round(kept * hits), n)


def test_gain_over_shrinking_reads_the_attack_where_the_skill_is_equal():
    """λ = ½ keeps .6 of the skill and .8 of the attack; the codec keeps .6 of the skill and .3 of the attack."""
    attack = ReplicatedArms(constant(0), constant(100), constant(30))
    skill = ReplicatedArms(constant(0), constant(100), constant(60))
    got = replicates.gain_over_shrinking(attack, skill, {0.5: (constant(80), constant(60))})
    assert got.factor == pytest.approx(0.5)
    assert got.gain.value == pytest.approx(0.5)
    assert got.gain.low > 0.3
    halfway = replicates.gain_over_shrinking(
        attack, ReplicatedArms(constant(0), constant(100), constant(80)), {0.5: (constant(80), constant(60))}
    )
    assert halfway.factor == pytest.approx(0.75)  # .8 of the skill lies halfway between .6 and 1
    assert halfway.gain.value == pytest.approx(0.9 - 0.3)


def test_gain_over_shrinking_covers_zero_where_the_codec_is_a_shrink():
    rng = np.random.default_rng(9)
    attack, skill = drawn(10, (0.02, 0.95, 0.5)), drawn(11, (0.02, 0.95, 0.6))
    path = {
        factor: tuple(
            runs(*((rng.random(100) < a * share).tolist() for _ in range(3)))
            for a, share in ((factor, 0.5 / 0.5), (factor, 0.6 / 0.5))
        )
        for factor in (0.25, 0.5, 0.75)
    }
    got = replicates.gain_over_shrinking(attack, skill, path)
    assert got.gain.low < 0 < got.gain.high
    assert got.factor == pytest.approx(0.5, abs=0.12)


def test_gain_over_shrinking_at_the_ends_of_the_path():
    attack = ReplicatedArms(constant(0), constant(100), constant(30))
    path = {0.5: (constant(80), constant(60)), 0.0: (constant(0), constant(0)), 1.0: (constant(100), constant(100))}
    below = ReplicatedArms(constant(10), constant(90), constant(5))
    above = ReplicatedArms(constant(0), constant(90), constant(95))
    assert replicates.gain_over_shrinking(attack, below, path).factor == 0
    assert replicates.gain_over_shrinking(attack, above, path).gain.value == pytest.approx(0.7)
    with pytest.raises(DataError, match="between 0 and 1"):
        replicates.gain_over_shrinking(attack, below, {1.0: path[1.0]})


def test_clusters_and_one_base():
    n = 100
    row = [i // 5 % 2 == 0 for i in range(n)]
    clusters = {f"p{i:03d}": i // 5 for i in range(n)}
    base, tuned, served = {f"p{i:03d}": False for i in range(n)}, constant(n), runs(row, row, row)
    plain = replicates.mitigation(ReplicatedArms.on_one_base(base, tuned, served)).absolute
    whole = replicates.mitigation(ReplicatedArms.on_one_base(base, tuned, served, clusters)).absolute
    assert (whole.prompts, whole.clusters) == (100, 20)
    assert (whole.high - whole.low) / (plain.high - plain.low) == pytest.approx(math.sqrt(5), rel=0.15)
    with pytest.raises(DataError, match="no cluster"):
        ReplicatedArms.on_one_base(base, tuned, served, {"p000": 1})


def test_arms_that_do_not_pair_are_refused():
    good = constant(3, n=5)
    with pytest.raises(DataError, match="seed 2"):
        ReplicatedArms(good, good, {0: good[0], 1: good[1]})
    with pytest.raises(DataError, match="prompt"):
        ReplicatedArms(good, good, {**good, 2: {"p000": True}})
    with pytest.raises(DataError, match="no seeds"):
        ReplicatedArms({}, {}, {})
    one, two = ReplicatedArms(good, good, good), ReplicatedArms(*[{0: good[0]}] * 3)
    with pytest.raises(DataError, match="other seeds"):
        replicates.selectivity(one, two)


def test_flips_are_given_by_seed():
    arms = ReplicatedArms(constant(0, 4, 2), constant(3, 4, 2), runs([True, False, True, True], [False] * 4))
    flips = arms.flips()
    assert (flips[0].lost_ids, flips[0].gained_ids) == (("p001",), ("p003",))
    assert flips[1].lost == 3


def test_equal_arguments_give_equal_estimates():
    arms = drawn(12, (0.05, 0.9, 0.4))
    assert replicates.mitigation(arms, seed=4, resamples=FEW) == replicates.mitigation(arms, seed=4, resamples=FEW)
    assert replicates.retention(arms, seed=4, resamples=FEW) != replicates.retention(arms, seed=5, resamples=FEW)
