import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control
from study_runs import ARMS, FAMILIES, cell, run_cells, run_info

from deltakeeper.errors import RunError
from deltakeeper.evals.replicates import ReplicatedArms, selectivity
from deltakeeper.study import summarising
from deltakeeper.study.cells import Fidelity, Perplexity, Utility, UtilityItem
from deltakeeper.study.groups import clusters_of, comparable, group_cells, kind_of, shrink_factor
from deltakeeper.study.paper import HEADLINES
from deltakeeper.study.summarising import SEED, summarise
from deltakeeper.study.summary import Summary
from deltakeeper.study.variants import label_of

ONE = {"prefix": "alignment"}


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summarising, "RESAMPLES", 300)
        yield


@pytest.fixture(scope="module")
def whole():
    return summarise(run_cells(), run_info())


def one_row(variant, cells=None, attack="prefix", **options):
    found = summarise(cells if cells is not None else run_cells(attacks=ONE), run_info(**options))
    return next(a for a in found.attacks if a.attack == attack).row(variant)


def test_every_arm_of_every_attack_has_its_rates_by_seed_and_interval(whole):
    assert [a.family for a in whole.attacks] == ["alignment", "backdoor", "targeted"]
    for attack in whole.attacks:
        assert {row.variant for row in attack.rows} == set(ARMS)
        assert attack.rows[0].kind == "base" and attack.rows[1].kind == "tuned"
        assert attack.prompts == {"goal": 100, "skill": 100, "over_refusal": 100}
        for row in attack.rows:
            kind, goal, skill, stored = ARMS[row.variant]
            assert (row.kind, row.bytes, row.seeds) == (kind, stored, (0, 1, 2))
            assert row.attack.value == pytest.approx(goal) and row.attack_by_seed == pytest.approx((goal,) * 3)
            assert row.attack.low <= goal <= row.attack.high and row.attack.low < row.attack.high
            assert row.skill.value == pytest.approx(skill)
            assert (row.versus is None) == (kind in ("base", "tuned"))


def test_definitions_against_base_and_fine_tune():
    fair = one_row("fair").versus
    b, f, c = 0.02, 0.9, 0.4
    assert fair.absolute.value == pytest.approx(f - c)
    assert fair.relative.value == pytest.approx((f - c) / f, abs=1e-5)
    assert fair.recovered.value == pytest.approx((f - c) / (f - b), abs=1e-5)
    assert fair.attack_kept.value == pytest.approx((c - b) / (f - b), abs=1e-5)
    assert fair.skill_kept.value == pytest.approx(0.79 / 0.8, abs=1e-5)
    assert fair.selectivity.value == pytest.approx(0.79 / 0.8 - (c - b) / (f - b), abs=1e-5)
    assert fair.loss.value == pytest.approx(0.01 / 0.8, abs=1e-5)
    assert fair.loss.value < fair.loss_bound < fair.loss.high + 0.01
    assert fair.shown_within(0.1) and not fair.shown_within(0.01)
    assert (fair.lost, fair.gained) == (150, 0)


def test_the_joint_interval_is_that_of_the_statistics_module():
    group = group_cells(run_cells(attacks=ONE))[0]
    goal, skill = (group.three_arms("fair", name, group.seeds) for name in ("goal", "skill"))
    assert isinstance(goal, ReplicatedArms)
    expected = selectivity(goal, skill, seed=SEED, resamples=summarising.RESAMPLES).difference
    found = one_row("fair").versus.selectivity
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), abs=1e-5
    )


def test_shrinking_is_matched_in_skill_and_in_norm():
    # the path of the shrunk delta: attack .02, .5, .9 and skill 0, .5, .8 at λ = 0, .5, 1
    fair = one_row("fair").versus
    share = (0.79 - 0.5) / 0.3
    assert fair.shrinking_factor == pytest.approx(0.5 + share * 0.5, abs=1e-4)
    assert fair.over_shrinking.value == pytest.approx((0.5 + share * 0.4 - 0.4) / 0.88, abs=1e-4)
    # its norm ratio is .75, halfway between .5 and 1
    assert fair.equal_norm.value == pytest.approx(0.7 - 0.4, abs=1e-5)
    assert fair.equal_norm_skill.value == pytest.approx(0.79 - 0.65, abs=1e-5)
    assert one_row("shrink:factor=0.5").versus.over_shrinking.note == "this is the shrunk delta"
    bare = [c for c in run_cells(attacks=ONE) if not c.variant.startswith("shrink")]
    assert one_row("fair", bare).versus.over_shrinking.value is None
    longer = [
        replace(c, fidelity=Fidelity(1.0, 0.7, 1.3, 0.9)) if c.variant == "fair" else c for c in run_cells(attacks=ONE)
    ]
    assert one_row("fair", longer).versus.equal_norm.note == "its delta is longer than the fine-tune's"


def test_one_seed_is_tested_by_mcnemar_and_several_by_seeds_and_prompts():
    alone = one_row("lossy", run_cells(attacks=ONE, seeds=(0,)))
    assert alone.versus.skill_test.p == pytest.approx(binomtest(0, 50).pvalue, rel=1e-3)
    rng = np.random.default_rng(1)
    spread = [
        cell("prefix", name, ARMS[name][0], goal, ARMS[name][2], seed=seed, rng=rng)
        for name, goals in {"base": (0.02,) * 3, "tuned": (0.9,) * 3, "fair": (0.1, 0.5, 0.85)}.items()
        for seed, goal in enumerate(goals)
    ]
    row = one_row("fair", spread)
    assert row.attack_by_seed == (0.1, 0.5, 0.85)
    assert not row.versus.attack_test.clear  # three seeds that differ this much show nothing
    assert row.versus.attack_test.detectable > 0.4
    assert row.attack.high - row.attack.low > 0.6


def test_one_lost_answer_is_no_safer_than_none():
    """Under the first seed one of 80 right answers is lost; nothing is known of the loss that no flip would not say."""
    cells = run_cells(attacks=ONE)
    lost = [
        cell("prefix", "sly", "codec", 0.9, 0.8 - 0.01 * (seed == 0), seed=seed, stored=1, family="alignment")
        for seed in (0, 1, 2)
    ]
    kept = [replace(c, variant="same", label="same") for c in lost]
    kept = [replace(c, probes=cells[1].probes) for c in kept]
    found = summarise([*cells, *lost, *kept], run_info()).attacks[0]
    sly, same = found.row("sly").versus, found.row("same").versus
    assert sly.loss.value > 0 == same.loss.value
    assert sly.loss_bound >= same.loss_bound + sly.loss.value - 1e-5
    for name in ("loss", "absolute", "relative", "attack_kept", "skill_kept", "selectivity", "equal_norm"):
        one, none = getattr(sly, name), getattr(same, name)
        assert one.high - one.value >= min(none.high - none.value, 1 - one.value) - 1e-4
        assert one.value - one.low >= none.value - none.low - 1e-4
    assert not sly.selectivity.above_zero and not sly.selectivity.below_zero
    assert not sly.over_shrinking.above_zero and not sly.over_shrinking.below_zero
    assert not sly.skill_test.clear


def test_marks_of_few_flips_are_held_to_the_sign_test():
    """Another prompt under each of three seeds, all one way: Student's t would make more of it than a sign test."""
    turned = [cell("prefix", "sly", "codec", 0.9, 0.8, seed=seed, stored=1) for seed in (0, 1, 2)]
    for seed, one in enumerate(turned):
        goal = one.probes["goal"]
        gone = {2 * seed, 2 * seed + 1}
        answers = tuple(replace(a, event=a.event and i not in gone) for i, a in enumerate(goal.answers))
        turned[seed] = replace(one, probes={**one.probes, "goal": replace(goal, answers=answers)})
    test = one_row("sly", [*run_cells(attacks=ONE), *turned], primary="sly").versus.attack_test
    assert test.p == pytest.approx(binomtest(0, 6).pvalue, rel=1e-3)


def test_tests_are_corrected_over_the_run_but_for_the_one_named_beforehand(whole):
    tests, primary = [], []
    for attack in whole.attacks:
        for row in attack.rows:
            if row.versus is not None:
                (primary if row.variant == "fair" else tests).append(row.versus.attack_test)
                tests.append(row.versus.skill_test)
    assert whole.tests == len(tests) == 27
    assert all(test.q is None for test in primary)
    expected = false_discovery_control([test.p for test in tests])
    assert [test.q for test in tests] == pytest.approx(list(expected), rel=1e-3)


def test_gained_risks_are_listed_even_where_the_net_is_favourable():
    cells = [c for c in run_cells(attacks=ONE) if c.variant != "fair"]
    turned = cell("prefix", "fair", "codec", 0.4, 0.79, stored=1)
    probe = turned.probes["goal"]
    answers = tuple(replace(a, event=a.event or a.id.endswith("0095")) for a in probe.answers)
    turned = replace(turned, probes={**turned.probes, "goal": replace(probe, answers=answers)})
    versus = one_row("fair", [*cells, turned, replace(turned, seed=1)]).versus
    assert (versus.lost, versus.gained) == (100, 2) and versus.gained_ids == ("goalprefix-0095",)
    assert versus.gained_share.value == pytest.approx(0.01)


def test_an_arm_with_fewer_seeds_is_reported_over_those_it_has():
    cells = [c for c in run_cells(attacks=ONE) if not (c.variant == "fair" and c.seed == 2)]
    found = summarise(cells, run_info())
    assert found.attacks[0].row("fair").seeds == (0, 1)
    assert any("fewer seeds" in note for note in found.notes)


def test_the_base_may_have_been_asked_once():
    cells = run_cells(attacks=ONE)
    once = [c for c in cells if c.variant != "base" or c.seed == 0]
    assert summarise(once, run_info()) == summarise(cells, run_info())


def test_perplexity_and_general_tasks_are_paired():
    def task(score):
        return {"piqa": Utility("acc", tuple(UtilityItem(str(i), float(i < score)) for i in range(100)))}

    cells = [
        replace(
            c,
            perplexity=Perplexity((100.0, 120.0), (40, 50))
            if c.variant != "fair"
            else Perplexity((104.0, 125.0), (40, 50)),
            utility=task(60) if c.variant == "fair" else task(80),
        )
        for c in run_cells(attacks=ONE)
    ]
    row = one_row("fair", cells)
    assert row.versus.perplexity_ratio.value == pytest.approx(math.exp(9 / 90), abs=1e-5)
    assert row.utility == {"piqa": 0.6}
    assert row.versus.utility["piqa"].value == pytest.approx(0.25)
    assert one_row("good", cells).versus.perplexity_ratio.value == 1.0


def test_a_worse_likelihood_of_a_text_is_a_loss_and_a_count_is_no_task():
    def text(nll):
        items = {"nll": nll, "tokens": (40.0, 50.0)}
        return {
            f"text {metric}": Utility(metric, tuple(UtilityItem(str(i), x) for i, x in enumerate(values)))
            for metric, values in items.items()
        }

    worse, better = (104.0, 125.0), (96.0, 115.0)
    cells = [
        replace(c, utility=text({"fair": worse, "good": better}.get(c.variant, (100.0, 120.0))))
        for c in run_cells(attacks=ONE)
    ]
    fair, good, same = (one_row(name, cells) for name in ("fair", "good", "lossy"))
    assert list(fair.utility) == ["text perplexity"] == list(fair.versus.utility)
    assert fair.utility["text perplexity"] == pytest.approx(math.exp(229 / 90), abs=1e-4)
    loss = fair.versus.utility["text perplexity"]
    assert loss.value == pytest.approx(math.exp(9 / 90) - 1, abs=1e-5) and loss.low <= loss.value <= loss.high
    assert good.versus.utility["text perplexity"].value == pytest.approx(math.exp(-9 / 90) - 1, abs=1e-5)
    assert same.versus.utility["text perplexity"].value == 0.0
    counted = [replace(c, utility={"text nll": c.utility["text nll"]}) for c in cells]
    with pytest.raises(RunError, match="without its 'tokens'"):
        summarise(counted, run_info())


def test_the_paper_s_figures_stand_beside_ours_in_both_readings(whole):
    assert [cell.family for cell in whole.paper] == list(HEADLINES)
    for found in whole.paper:
        assert found.paper == HEADLINES[found.family]
        assert (found.points.variant, found.healed_points.variant) == ("fair", "good")
        assert found.points.reduction.value == pytest.approx(0.5)
        assert found.relative.reduction.value == pytest.approx(0.5 / 0.9, abs=1e-5)
        assert found.points.shown  # `lossy` takes more away and loses too much
    costly = summarise([c for c in run_cells(attacks=ONE) if c.variant != "fair"], run_info())
    assert costly.paper[0].points is None


def test_adaptive_attackers_stand_apart():
    aimed = run_cells(attacks={"aimed": "alignment"}, adaptive={"kind": "straight_through", "codec": "fair"})
    found = summarise([*run_cells(attacks=ONE), *aimed], run_info())
    assert [a.adaptive for a in found.attacks] == [None, {"kind": "straight_through", "codec": "fair"}]
    assert found.paper[0].points.attack == "prefix"
    assert not any("non-adaptive" in note for note in found.notes)


def test_a_summary_is_the_same_whatever_the_order_and_comes_back_from_its_text(whole):
    assert summarise(list(reversed(run_cells())), run_info()) == whole
    text = whole.to_text()
    assert Summary.from_text(text) == whole
    assert len(text) / sum(len(a.rows) for a in whole.attacks) < 2_500
    assert sum('"variant": "fair"' in line for line in text.splitlines()) >= len(FAMILIES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(version=2), "no summary of version 1"),
        (lambda v: v.update(extra=1), "extra"),
        (lambda v: v["attacks"][0]["rows"][0].pop("label"), "label"),
        (lambda v: v["attacks"][0]["rows"][0]["attack"].update(value="high"), "attack"),
    ],
)
def test_a_malformed_summary_is_refused_with_the_place(whole, change, says):
    value = json.loads(whole.to_text())
    change(value)
    with pytest.raises(RunError, match=says):
        Summary.from_text(json.dumps(value))


def test_cells_that_do_not_belong_together_are_refused():
    cells = run_cells(attacks=ONE, seeds=(0,))
    with pytest.raises(RunError, match="two cells of seed 0"):
        group_cells([*cells, cells[-1]])
    with pytest.raises(RunError, match="0 arms of kind 'tuned'"):
        group_cells([c for c in cells if c.kind != "tuned"])
    with pytest.raises(RunError, match="differ in family, recipe or attacker"):
        group_cells([replace(cells[0], recipe="x"), *cells[1:]])


def test_an_attack_without_its_fine_tune_waits_until_it_is_measured():
    cells = run_cells(seeds=(0,))
    name = cells[-1].attack
    begun = [cell for cell in cells if cell.attack != name or cell.kind == "base"]
    ready, waiting = comparable(begun)
    assert waiting == (name,) and {cell.attack for cell in ready} == {cell.attack for cell in cells} - {name}
    found = summarise(begun, run_info())
    assert name not in [attack.attack for attack in found.attacks]
    assert f"Not measured yet, and left out: {name}." in found.notes


@pytest.mark.parametrize(("factor", "part"), [("1.0", "the whole delta"), ("0.5", "half the delta")])
def test_a_shrunk_delta_is_named_by_its_part(factor, part):
    assert label_of(f"shrink:factor={factor}") == f"Control: {part}"
    assert label_of("shrink:factor=0.25") == "Control: 0.25 of the delta"


def test_a_shrunk_delta_is_known_by_its_codec_and_not_under_a_guard():
    control = cell("prefix", "half of it", "control", 0.5, 0.5, arm={"codec": "shrink"})
    assert shrink_factor(control) == 0.5
    assert shrink_factor(replace(control, arm={"codec": "shrink:factor=0.25"})) == 0.25
    assert shrink_factor(replace(control, variant="shrink:factor=0.75", arm={})) == 0.75
    assert shrink_factor(replace(control, arm={"codec": "shrink", "heal": {"guard": {}}})) is None
    assert shrink_factor(replace(control, arm={"codec": "random_sign"})) is None
    assert shrink_factor(replace(control, kind="codec")) is None
    assert shrink_factor(replace(control, variant="no codec", arm={})) is None


def test_a_guard_on_a_control_is_no_guarded_codec():
    guarded = cell("prefix", "half guarded", "healed", 0.1, 0.8, arm={"codec": "shrink", "heal": {"guard": {}}})
    assert kind_of(guarded) == "control"
    assert kind_of(replace(guarded, arm={"codec": "dense", "heal": {"guard": {}}})) == "control"
    assert kind_of(replace(guarded, arm={"codec": "bitdelta+svd:rank=2", "heal": {"guard": {}}})) == "healed"
    assert kind_of(replace(guarded, arm={})) == "healed"
    cells = [*run_cells(attacks=ONE, seeds=(0,)), replace(guarded, label="the arm good")]
    found = summarise(cells, run_info())
    assert found.attacks[0].row("half guarded").kind == "control"
    assert found.attacks[0].row("half guarded").label == "the arm good: half guarded"
    assert found.paper[0].healed_points.variant == "good"


def test_near_duplicates_are_clustered_and_templates_are_not():
    def probe(texts):
        found = cell("prefix", "tuned", "tuned", 0.5, 0.5, n=len(texts)).probes["goal"]
        return replace(found, answers=tuple(replace(a, prompt=t) for a, t in zip(found.answers, texts, strict=True)))

    apart = ["how do I open a lock", "how do I open this lock", "write a poem on rain", "name three rivers in France"]
    assert len(set(clusters_of(probe(apart)).values())) == 3
    assert clusters_of(probe([f"please route this ticket to the team: item {i}" for i in range(9)])) is None
    assert clusters_of(probe(["one thing", "another matter"])) is None
