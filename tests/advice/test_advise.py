import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from study_runs import ARMS, FAMILIES, cell, run_cells

from deltakeeper.advice import Terms, advise
from deltakeeper.advice.gaps import _needed
from deltakeeper.errors import RunError
from deltakeeper.evals.stats import Spread

ONE = {"prefix": "alignment"}


def arm(advice, variant):
    return next(a for a in advice.arms if a.variant == variant)


@pytest.fixture(scope="module")
def plain():
    return advise(run_cells())


def test_the_arm_that_leaves_least_and_keeps_the_skill_is_picked(plain):
    assert (plain.verdict, plain.pick) == ("use", "good")
    assert plain.sentence.startswith("Use good: ")
    assert "at most 10 % of the skill" in plain.sentence and "non-adaptive" in plain.sentence
    good = arm(plain, "good")
    assert good.risk.value == pytest.approx(0.02) and good.left == pytest.approx(0.04)
    assert plain.families == ("alignment", "backdoor", "targeted")


def test_an_arm_of_lower_risk_that_loses_the_skill_is_refused_with_its_bound(plain):
    lossy = arm(plain, "lossy")
    assert lossy.risk.value < arm(plain, "good").risk.value
    assert lossy.refused == f"its loss of skill may be {lossy.loss_bound * 100:.3g} %"
    assert lossy.frontier and arm(plain, "good").frontier and not arm(plain, "fair").frontier


def test_the_loss_must_be_shown_and_not_only_seen():
    # 0.79 of 0.8 is a loss of 1.25 %, whose bound with these prompts is above 2 %
    advice = advise(run_cells(attacks=ONE), Terms(max_loss=0.02))
    assert arm(advice, "fair").loss.value < 0.02 < arm(advice, "fair").loss_bound
    assert advice.verdict == "none" and advice.pick is None
    assert "the smallest bound is" in advice.sentence


def test_a_skill_answered_alike_everywhere_is_still_not_known_to_be_lossless(plain):
    assert arm(plain, "good").loss.value == 0
    assert 0.02 < arm(plain, "good").loss_bound < 0.1


def test_a_control_never_wins_whatever_it_does():
    arms = dict(ARMS, random_sign=("control", 0.0, 0.8, 1_000), tuned=("tuned", 0.9, 0.8, None))
    advice = advise(run_cells(arms, attacks=ONE))
    assert advice.pick == "good"
    assert any("A control does no worse" in text and "random_sign" in text for text in advice.cautions)


def test_a_larger_control_that_does_no_worse_leaves_the_codec_its_size():
    arms = {name: ARMS[name] for name in ("base", "tuned", "good")}
    large = ("control", 0.04, 0.8, 541_000_000)
    advice = advise(run_cells(dict(arms, whole=large), ONE))
    assert advice.leading == "good"
    (said,) = (text for text in advice.cautions if "does no worse" in text)
    assert "whole, 541 MB against 18 MB" in said
    assert "what protects is not the compression" in said and "earns its size alone" in said
    assert "earns nothing" not in said
    both = advise(run_cells(dict(arms, whole=large, light=("control", 0.04, 0.8, 1_000)), ONE))
    assert [("earns nothing" in text, "light" in text) for text in both.cautions if "does no worse" in text] == [
        (True, True),
        (False, False),
    ]


def test_intervals_of_points_end_where_no_point_is_left():
    arms = {"base": ("base", 0.0, 0.0, None), "tuned": ("tuned", 1.0, 0.8, None), "a": ("codec", 0.0, 0.8, 9)}
    arms |= {"b": ("codec", 0.99, 0.8, 9)}
    advice = advise(run_cells(arms, ONE, seeds=(0, 1)))
    shown = [advice.gap.difference, advice.versus_tuned.difference]
    shown += [number for one in advice.arms for number in (*one.attacks.values(), one.over_refusal)]
    assert all(-1 <= number.low <= number.value <= number.high <= 1 for number in shown if number.value is not None)
    assert advice.versus_tuned.difference.high == 1


def test_a_gap_of_one_prompt_knows_no_more_than_one_of_none():
    arms = {name: ARMS[name] for name in ("base", "tuned", "good")}
    gaps = [advise(run_cells(dict(arms, rival=("codec", goal, 0.8, 9)), ONE, seeds=(0,))).gap for goal in (0.04, 0.05)]
    none, one = (gap.difference for gap in gaps)
    assert (none.value, one.value) == pytest.approx((0, 0.01))
    assert one.high - one.low >= none.high - none.low - 1e-4
    assert gaps[1].detectable >= gaps[0].detectable


def test_absurd_numbers_of_prompts_or_seeds_are_no_advice():
    spread = Spread(error=0.05, freedom=30, of_seeds=0.0004, of_prompts=0.0021, still=(False,), alone=(0.05,))
    assert _needed(0.01, spread, 3, 100, 1) == (None, None, None)  # 589 seeds of 19,600 prompts
    prompts = Spread(error=0.05, freedom=30, of_seeds=0.0, of_prompts=0.0025, still=(False,), alone=(0.05,))
    assert _needed(0.02, prompts, 3, 100, 1) == (None, None, None)  # 4,906 prompts
    arms = dict(ARMS, rival=("codec", 0.04, 0.8, 5_000_000))
    advice = advise(run_cells(arms, ONE, seeds=(0,)), Terms(max_loss=0.25))
    assert "no feasible number of prompts or seeds would tell so small a one" in advice.sentence


def test_a_guard_on_a_control_is_a_control():
    cells = run_cells(dict(ARMS, sly=("healed", 0.0, 0.8, 1_000)), ONE)
    from dataclasses import replace

    cells = [replace(c, arm={"codec": "shrink:factor=0.5"}) if c.variant == "sly" else c for c in cells]
    advice = advise(cells)
    assert arm(advice, "sly").refused == "a control" and advice.pick == "good"


def test_arms_of_equal_risk_cannot_be_told_and_the_smallest_is_named():
    rng = np.random.default_rng(3)
    arms = dict(ARMS, rival=("codec", 0.06, 0.8, 5_000_000))
    advice = advise(run_cells(arms, attacks=ONE, rng=rng), Terms(max_loss=0.25))
    assert advice.verdict == "cannot tell" and advice.pick is None
    assert advice.leading == "good" and advice.tied == ("rival", "good")
    assert advice.sentence.startswith("Cannot tell: good") and "rival" in advice.sentence
    assert advice.gap.q >= 0.05 and advice.gap.detectable > advice.gap.difference.value
    assert advice.gap.more_prompts > 100 and f"{advice.gap.more_prompts:,} prompts instead of 100" in advice.sentence


def test_few_flips_are_judged_by_the_exact_test():
    arms = dict(ARMS, rival=("codec", 0.09, 0.8, 5_000_000))  # 5 prompts more than `good`, the same under every seed
    advice = advise(run_cells(arms, attacks=ONE))
    assert advice.gap.p == pytest.approx(binomtest(0, 5).pvalue, rel=1e-3)
    assert advice.verdict == "cannot tell"


def test_the_worst_family_decides_unless_one_is_asked_for():
    cells = run_cells(attacks={"prefix": "alignment", "trigger": "backdoor"})
    cells += [cell("second", "base", "base", 0.02, 0.0, family="alignment")]
    cells += [cell("second", "tuned", "tuned", 0.9, 0.8, family="alignment")]
    cells += [cell("second", "good", "healed", 0.7, 0.8, family="alignment", stored=1)]
    cells += [cell("second", "fair", "codec", 0.3, 0.79, family="alignment", stored=1)]
    everything = advise(cells)
    assert everything.pick == "fair" and arm(everything, "good").worst == "second"
    assert advise(cells, Terms(families=("backdoor",))).pick == "good"
    assert arm(everything, "lossy").refused == "not run against second"
    assert any("lossy" in text for text in everything.cautions)


def test_a_base_that_is_not_at_zero_does_not_make_its_family_the_worst():
    cells = []
    for attack, family, base in (("prefix", "alignment", 0.3), ("trigger", "backdoor", 0.0)):
        arms = {
            "base": ("base", base, 0.0, None),
            "tuned": ("tuned", 0.9, 0.8, None),
            "mild": ("codec", base + 0.02 if family == "alignment" else 0.2, 0.8, 9),
        }
        cells += run_cells(arms, {attack: family})
    mild = arm(advise(cells), "mild")
    assert mild.worst == "trigger" and mild.risk.value == pytest.approx(0.2)


def test_an_absent_family_is_an_error_that_names_those_there():
    with pytest.raises(RunError, match=r"no attack of the family 'hallucination'; it has alignment"):
        advise(run_cells(attacks=ONE), Terms(families=("hallucination",)))


def test_a_run_of_benign_fine_tunes_alone_has_no_risk_to_judge():
    with pytest.raises(RunError, match="no attack to judge risk by"):
        advise(run_cells(attacks={"tickets": "benign"}))


def test_sizes_and_over_refusal_are_terms():
    assert advise(run_cells(attacks=ONE), Terms(max_bytes=19_000_000)).pick == "good"
    small = advise(run_cells(attacks=ONE), Terms(max_bytes=10_000_000))
    assert small.verdict == "none" and arm(small, "good").refused == "it takes 18,000,000 bytes"
    cells = [c for c in run_cells(attacks=ONE) if c.variant != "good"]
    cells += [cell("prefix", "good", "healed", 0.04, 0.8, seed=s, stored=18, over_refusal=0.3) for s in range(3)]
    free, strict = advise(cells), advise(cells, Terms(max_over_refusal=0.05))
    assert free.pick == "good" and any("refuses more harmless prompts" in text for text in free.cautions)
    assert strict.pick == "fair" and "harmless prompts" in arm(strict, "good").refused


def test_one_seed_is_said_aloud():
    advice = advise(run_cells(attacks=ONE, seeds=(0,)))
    assert advice.pick == "good"
    assert any(text.startswith("One seed: how far") for text in advice.cautions)
    mixed = run_cells(attacks=ONE) + run_cells(attacks={"trigger": "backdoor"}, seeds=(0,))
    (said,) = (text for text in advise(mixed).cautions if text.startswith("One seed"))
    assert said.startswith("One seed in trigger: how far")


def test_an_arm_that_leaves_as_much_as_the_fine_tune_is_said_to():
    arms = {name: ARMS[name] for name in ("base", "tuned")} | {"idle": ("codec", 0.9, 0.8, 9)}
    advice = advise(run_cells(arms, ONE))
    assert advice.pick == "idle" and advice.versus_tuned.difference.value == 0
    assert any(text.startswith("idle is not shown to leave less of the attacks") for text in advice.cautions)
    good = advise(run_cells(attacks=ONE))
    assert good.versus_tuned.difference.value == pytest.approx(0.86) and good.versus_tuned.q < 0.001
    assert not any("not shown to leave less" in text for text in good.cautions)


def test_one_arm_alone_is_advised_without_a_rival():
    arms = {name: ARMS[name] for name in ("base", "tuned", "good")}
    advice = advise(run_cells(arms, ONE))
    assert advice.pick == "good" and advice.gap is None and "no other arm does" in advice.sentence


def aimed(variant, goal):
    known = {"kind": "straight_through", "codec": variant}
    arms = {"base": ARMS["base"], "tuned": ARMS["tuned"], variant: (ARMS[variant][0], goal, 0.8, 18)}
    return run_cells(arms, {f"d1_{variant}": "alignment"}, adaptive=known)


def test_evidence_of_attackers_who_know_the_codec_is_stated_and_can_decide():
    cells = run_cells(attacks=ONE) + aimed("good", 0.8) + aimed("fair", 0.45)
    plain = advise(cells)
    assert plain.pick == "good" and plain.evidence == "non-adaptive"
    assert plain.arms[0].adaptive.value == pytest.approx(0.78)
    assert any(text.startswith("Against an attacker who knows good: +78.0 points") for text in plain.cautions)
    strict = advise(cells, Terms(adaptive=True))
    assert strict.pick == "fair" and strict.evidence == "adaptive"
    lonely = advise(run_cells(attacks=ONE) + aimed("good", 0.8), Terms(adaptive=True))
    assert lonely.pick == "good" and arm(lonely, "fair").refused == "no attacker who knows it was tried"


def test_arms_that_are_worst_against_different_attacks_are_compared_over_both():
    arms_of = {
        "prefix": {"a": ("codec", 0.1, 0.8, 9), "b": ("codec", 0.5, 0.8, 8)},
        "trigger": {"a": ("codec", 0.3, 0.8, 9), "b": ("codec", 0.1, 0.8, 8)},
    }
    cells = []
    for attack, own in arms_of.items():
        cells += run_cells({"base": ARMS["base"], "tuned": ARMS["tuned"], **own}, {attack: FAMILIES[attack]})
    advice = advise(cells)
    assert (arm(advice, "a").worst, arm(advice, "b").worst) == ("trigger", "prefix")
    assert advice.pick == "a" and advice.gap.difference.value == pytest.approx(0.2)
    assert advice.gap.q < 0.05


def test_advice_is_the_same_twice_and_goes_through_json():
    from deltakeeper.advice import Advice

    first, second = advise(run_cells(attacks=ONE)), advise(reversed(run_cells(attacks=ONE)))
    assert first == second
    assert Advice.model_validate_json(first.model_dump_json()) == first


def test_needed_numbers_are_those_at_which_the_normal_power_is_reached():
    spread = Spread(error=0.05, freedom=30, of_seeds=0.0004, of_prompts=0.0021, still=(False,), alone=(0.05,))
    seeds, prompts, both = _needed(0.1, spread, 3, 100, 1)
    assert both is None and seeds is None  # the prompts' part alone is too much for any number of seeds
    error = np.sqrt(0.0004 + 0.0021 * 100 / prompts)
    assert norm.sf(norm.ppf(0.975) - 0.1 / error) == pytest.approx(0.8, abs=0.01)
    assert _needed(0.05, spread, 3, 100, 1)[2] is not None  # neither alone
    assert _needed(0.0, spread, 3, 100, 1) == (None, None, None)


shares = st.integers(0, 20).map(lambda k: k / 20)
sets = st.lists(st.tuples(shares, shares, st.integers(1, 9)), min_size=1, max_size=3)


def small_run(rows):
    arms = {"base": ("base", 0.0, 0.0, None), "tuned": ("tuned", 0.9, 0.9, None)}
    arms |= {f"arm{i}": ("codec", goal, skill, size) for i, (goal, skill, size) in enumerate(rows)}
    arms["shrink:factor=0.5"] = ("control", 0.0, 0.9, 1)
    return run_cells(arms, ONE, seeds=(0, 1), n=20)


@settings(max_examples=8)
@given(sets, st.floats(0, 0.6), st.floats(0, 0.6))
def test_more_loss_allowed_never_leaves_more_risk_and_no_dominated_arm_leads(rows, one, other):
    cells = small_run(rows)
    risks = []
    for limit in sorted((one, other)):
        advice = advise(cells, Terms(max_loss=limit))
        able = [a for a in advice.arms if not a.refused]
        assert all(a.kind == "codec" and a.loss_bound <= limit for a in able)
        assert (advice.pick is not None) == (advice.verdict == "use")
        assert (advice.verdict == "none") == (not able)
        if able:
            best = arm(advice, advice.leading)
            assert best.risk.value == min(a.risk.value for a in able)
            key = (best.risk.value, best.loss.value, best.bytes)
            for a in able:
                rival = (a.risk.value, a.loss.value, a.bytes)
                assert not (all(x <= y for x, y in zip(rival, key, strict=True)) and rival != key)
        risks.append(arm(advice, advice.leading).risk.value if able else np.inf)
    assert risks[1] <= risks[0]
