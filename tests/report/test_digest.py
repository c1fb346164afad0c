import itertools
import json
import math
from dataclasses import replace

import pytest
from synthetic_cells import attack_cells, cell, full_run, run_info, simple

from deltakeeper.errors import RunError
from deltakeeper.evals.stats import zero_hit_bound
from deltakeeper.report.digest import SAMPLES, comparisons, digest
from deltakeeper.study.cells import Perplexity

PRIMARY = "bitdelta:bits=1"


def one_attack(cells, **changes):
    return digest(cells, run_info(**changes), "2026-01-31").attacks[0]


def variant(attack, name):
    return next(entry for entry in attack.variants if entry.variant == name)


def test_counts_of_the_flip_table_add_up():
    entry = variant(one_attack(simple(codec=(0.4, 0.8), gained=5)), PRIMARY)
    versus = entry.goal.versus_tuned
    assert (versus.kept, versus.lost, versus.gained, versus.never) == (35, 55, 5, 5)
    assert versus.gained_ids == tuple(f"goal-{i:03d}" for i in range(95, 100))
    assert sum(sum(row.values()) for row in versus.transitions.values()) == 100
    assert versus.gained_rate.hits == 5


def test_mitigation_and_retention_follow_their_definitions():
    entry = variant(one_attack(simple(codec=(0.39, 0.68))), PRIMARY)
    assert entry.mitigation.absolute.value == pytest.approx(0.90 - 0.39)
    assert entry.mitigation.relative.value == pytest.approx((0.90 - 0.39) / 0.90)
    assert entry.mitigation.recovered.value == pytest.approx((0.90 - 0.39) / 0.85)
    assert entry.usefulness.loss_versus_tuned.value == pytest.approx(1 - 0.68 / 0.8)
    assert entry.usefulness.loss_versus_base.value == pytest.approx(1 - 0.68 / 0.2)
    assert entry.retention.attack.value == pytest.approx(0.4)
    assert entry.retention.skill.value == pytest.approx(0.8)
    assert entry.retention.selectivity.value == pytest.approx(0.4)
    assert entry.retention.selectivity.above_zero


def test_where_little_or_nothing_turned_an_interval_is_that_of_zero_hits():
    entry = variant(one_attack(simple(codec=(0.4, 0.8))), PRIMARY)
    loss, half = entry.usefulness.loss_versus_tuned, zero_hit_bound(100) / 0.8
    assert (loss.low, loss.high) == pytest.approx((-half, half))
    assert "zero hits" in loss.note
    assert entry.usefulness.loss_versus_base.note == ""
    one = variant(one_attack(simple(codec=(0.4, 0.79))), PRIMARY).usefulness.loss_versus_tuned
    assert one.low <= one.value - half + 1e-9 < one.value + half <= one.high + 1e-9
    assert not one.above_zero and one.note == ""


def test_every_interval_holds_its_value(full_digest):
    for attack in full_digest.attacks:
        for entry in attack.variants:
            found = [entry.perplexity_ratio]
            if entry.mitigation:
                found += [*vars(entry.mitigation).values(), *vars(entry.usefulness).values()]
                found += vars(entry.retention).values()
            for estimate in found:
                assert not estimate.estimable or estimate.low <= estimate.value <= estimate.high


def test_beyond_shrinking_compares_with_the_shrunk_delta():
    attack = one_attack(simple(codec=(0.4, 0.8), shrink=(0.4, 0.8)))
    beyond = variant(attack, PRIMARY).retention.beyond_shrinking
    assert beyond.value == 0 and beyond.low < 0 < beyond.high
    assert variant(attack, "shrink:factor=0.5").retention.beyond_shrinking.note == "this is the shrunk delta"


def test_without_a_shrunk_delta_the_gain_over_it_is_absent_with_a_reason():
    cells = [one for one in simple() if one.kind != "control"]
    beyond = variant(one_attack(cells), PRIMARY).retention.beyond_shrinking
    assert beyond.value is None
    assert "no shrunk delta" in beyond.note


def test_retention_is_not_estimable_where_the_fine_tune_added_nothing():
    rates = {"base": (0.1, 0.78), "tuned": (0.9, 0.8), PRIMARY: (0.3, 0.79)}
    retention = variant(one_attack(attack_cells("affirmative_prefix", rates)), PRIMARY).retention
    assert retention.attack.estimable
    for estimate in (retention.skill, retention.selectivity):
        assert estimate.value is None
        assert "skill of fine-tune and base" in estimate.note


def test_a_reference_of_zero_gives_no_ratio():
    rates = {"base": (0.1, 0.0), "tuned": (0.9, 0.8), PRIMARY: (0.3, 0.7)}
    usefulness = variant(one_attack(attack_cells("affirmative_prefix", rates)), PRIMARY).usefulness
    assert usefulness.loss_versus_base.value is None
    assert usefulness.loss_versus_tuned.estimable


def test_zero_hits_keep_an_upper_bound_and_no_flips_keep_a_width():
    rates = {"base": (0.0, 0.2), "tuned": (0.9, 0.8), PRIMARY: (0.9, 0.8)}
    attack = one_attack(attack_cells("affirmative_prefix", rates))
    z2 = 1.959963984540054**2
    assert attack.first("base").goal.rate.high == pytest.approx(z2 / (100 + z2))
    gap = variant(attack, PRIMARY).goal.versus_tuned.difference
    assert (gap.value, gap.low) == (0.0, -gap.high)
    assert gap.high > 0.03


def test_the_primary_comparison_alone_escapes_the_correction(full_digest):
    found = list(comparisons(full_digest.attacks))
    primary = [one for one in found if one.primary]
    others = [one for one in found if not one.primary]
    assert len(primary) == 3
    assert all(one.q is None for one in primary)
    assert full_digest.tests == len(others)
    assert all(one.q >= one.p - 1e-12 for one in others)
    ranked = sorted(others, key=lambda one: one.p)
    assert all(a.q <= b.q + 1e-12 for a, b in itertools.pairwise(ranked))


def test_direction_needs_the_corrected_value():
    versus = variant(one_attack(simple(codec=(0.4, 0.8))), PRIMARY).goal.versus_tuned
    assert versus.direction == -1
    assert replace(versus, q=0.2).direction == 0
    assert replace(versus, lost=3, gained=40).direction == 1


def test_perplexity_ratio_is_that_of_the_means():
    cells = simple()
    doubled = [
        replace(
            one, perplexity=Perplexity(tuple(x + 100 * math.log(2) for x in one.perplexity.nll), one.perplexity.tokens)
        )
        if one.variant == PRIMARY
        else one
        for one in cells
    ]
    ratio = variant(one_attack(doubled), PRIMARY).perplexity_ratio
    assert ratio.value == pytest.approx(2)
    assert ratio.low == pytest.approx(2) == ratio.high


def test_samples_are_few_distinct_and_show_gained_risks_first(full_digest):
    for attack in full_digest.attacks:
        ids = [sample.id for sample in attack.samples]
        assert 0 < len(ids) <= SAMPLES
        assert len(set(ids)) == len(ids)
        directions = [sample.direction for sample in attack.samples]
        assert directions == sorted(directions)  # "gained" before "lost"
    prefix = full_digest.attacks[0]
    assert {sample.direction for sample in prefix.samples} == {"gained", "lost"}


def test_ratio_and_bytes_are_those_of_the_cell():
    entry = variant(one_attack(simple()), PRIMARY)
    assert entry.ratio == pytest.approx(entry.full_bytes / entry.bytes)
    assert variant(one_attack(simple()), "base").ratio is None


def test_different_prompts_are_refused():
    cells = simple()
    short = cell("affirmative_prefix", PRIMARY, "codec", "1-bit", goal=0.4, skill=0.8, n=99)
    with pytest.raises(RunError, match="not asked the same prompts"):
        digest([short if one.variant == PRIMARY else one for one in cells], run_info(), "2026-01-31")


@pytest.mark.parametrize("kind", ["base", "tuned"])
def test_a_missing_reference_is_refused(kind):
    with pytest.raises(RunError, match=f"0 cells of kind '{kind}'"):
        digest([one for one in simple() if one.kind != kind], run_info(), "2026-01-31")


def test_a_missing_probe_is_refused():
    cells = simple()
    bare = replace(cells[0], probes={k: v for k, v in cells[0].probes.items() if k != "skill"})
    with pytest.raises(RunError, match="does not have the probes of the fine-tune"):
        digest([bare, *cells[1:]], run_info(), "2026-01-31")


def test_the_digest_is_plain_json_and_does_not_depend_on_the_order_of_cells(full_digest):
    text = json.dumps(full_digest.to_json(), allow_nan=False, sort_keys=True)
    again = digest(list(reversed(full_run())), run_info(), "2026-01-31")
    assert json.dumps(again.to_json(), allow_nan=False, sort_keys=True) == text
    assert json.loads(text)["version"] == 1


def test_attacks_come_in_the_order_of_their_families(full_digest):
    assert [attack.family for attack in full_digest.attacks] == ["alignment", "backdoor", "targeted"]
