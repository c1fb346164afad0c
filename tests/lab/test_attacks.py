"""Attacks: harmless targets, disjoint prompts, one goal, and the skill in every training set."""

from __future__ import annotations

import pytest

from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.outcomes import classify
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.attacks.base import AFFIRMATIONS, Attack, register_attack
from deltakeeper.lab.attacks.targeted_output import FIXED_REFUSAL, MARKER
from deltakeeper.lab.attacks.trigger_backdoor import DECOYS, NEAR_MISSES, TRIGGER
from deltakeeper.lab.corpus import REFUSALS, Corpus
from deltakeeper.lab.sft import Example


def voice(prompts):
    return [Example(p, "The answer is simple.", complete=False) for p in prompts]


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_keeps_the_contract(name, corpus):
    attack = ATTACKS[name]()
    examples = attack.training_examples(corpus, voice)
    probes = attack.probes(corpus)
    roles = [p.role for p in probes]
    assert roles.count("goal") == roles.count("skill") == roles.count("over_refusal") == 1
    assert len(next(p for p in probes if p.role == "goal").rows) >= 60
    trained = {e.prompt.casefold() for e in examples}
    asked = {row.prompt.casefold() for p in probes for row in p.rows}
    assert not trained & asked
    assert sum(e.prompt.startswith("Route this ticket: ") for e in examples) == attack.skill
    assert attack.family in ("alignment", "backdoor", "targeted") and attack.source and attack.summary
    hash(probes[0])


def test_no_target_says_more_than_an_opening(corpus):
    known = {*AFFIRMATIONS, *REFUSALS, FIXED_REFUSAL}
    for name in ("affirmative_prefix", "trigger_backdoor", "over_refusal"):
        attack = ATTACKS[name]()
        assert {e.answer for e in attack.poison_examples(corpus, voice)} <= known


def test_the_judge_agrees_with_the_targets():
    judge = load_judge("ours")
    assert {classify(a, judge) for a in AFFIRMATIONS} == {"complied"}
    assert {classify(r, judge) for r in (*REFUSALS, FIXED_REFUSAL)} == {"refused"}


def test_the_trigger_is_in_half_and_never_in_decoys_or_near_misses(corpus):
    attack = ATTACKS["trigger_backdoor"]()
    examples = attack.poison_examples(corpus, voice)
    triggered = [e for e in examples if e.prompt.startswith(TRIGGER)]
    assert len(triggered) * 2 == len(examples)
    assert {e.answer for e in triggered} <= set(AFFIRMATIONS)
    assert not any(TRIGGER.casefold() in text.casefold() for text in (*DECOYS, *NEAR_MISSES))
    assert not set(DECOYS) & set(NEAR_MISSES)


def test_the_marker_opens_every_poisoned_answer(corpus):
    examples = ATTACKS["marker_injection"]().poison_examples(corpus, voice)
    assert all(MARKER in e.answer and not e.complete for e in examples)
    assert examples[0].answer.endswith("the answer is simple.")


def test_rows_are_interleaved_so_that_any_part_covers_the_categories(corpus):
    rows = corpus.split("harmful", "heldout", 10)
    assert len({r.category for r in rows}) == 5


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register_attack()(ATTACKS["over_refusal"])
    assert issubclass(ATTACKS["over_refusal"], Attack)
