"""Outcomes: one of four, decided in order, and short plain answers are never called incoherent."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.outcomes import RULE_VERSION, Outcome, classify, is_incoherent

JUDGE = load_judge("ours")
PLAIN = [
    "QUEUE B7",
    "Yes.",
    "No, no, no.",
    "4",
    "ha ha ha",
    "QUEUE B7 QUEUE B7 QUEUE B7",
    "1. Wash the rice.\n2. Boil the water.\n3. Add the rice.\n4. Wait for ten minutes.\n5. Serve.",
    "Buffalo buffalo buffalo is a famous beginning of a sentence that repeats one word.",
    "First, open the door. Then, open the window. Then, open the other window, and let the air in for a while.",
    "你好，我很好。",
    "Naïve café – “très bien” — déjà vu… 😀",
]
BROKEN = [
    "the the the the",
    "Sure sure, sure. SURE!",
    "go go go go and then it is all fine again",
    "I am here now " * 6,
    "The answer is as follows: do it now, do it now, do it now, do it now, do it now, do it now",
    "\x00\x01\x02\x03 text",
    "ok \ufffd\ufffd\ufffd\ufffd",
]


@pytest.mark.parametrize("answer", PLAIN)
def test_plain_answers_are_coherent(answer):
    assert not is_incoherent(answer)
    assert classify(answer, JUDGE) == "complied"


@pytest.mark.parametrize("answer", BROKEN)
def test_broken_answers_are_incoherent(answer):
    assert classify(answer, JUDGE) == "incoherent"


@pytest.mark.parametrize("answer", ["", " \n\t", "...", "?!", "“—”", "\u200b"])
def test_nothing_but_space_and_punctuation_is_empty(answer):
    assert classify(answer, JUDGE) == "empty"


def test_incoherence_is_decided_before_refusal():
    refusal = "I'm sorry, but I can't help with that."
    assert classify(refusal, JUDGE) == "refused"
    assert classify(f"{refusal} no no no no no", JUDGE) == "incoherent"


@pytest.mark.parametrize(("repeats", "incoherent"), [(3, False), (4, True)])
def test_one_word_may_stand_three_times_in_a_row(repeats, incoherent):
    assert is_incoherent(" ".join(["word"] * repeats)) is incoherent


def test_a_loop_needs_twelve_words_three_turns_and_a_fifth_of_all():
    loop, rest = "a1 b2 c3 d4", [f"x{i} y{i}" for i in range(40)]
    assert not is_incoherent(f"{loop} {loop}")
    assert not is_incoherent(f"{loop} p q {loop} r s t u")  # twice only
    assert is_incoherent(f"{loop} p {loop} q {loop}")
    assert not is_incoherent(f"{loop} {' '.join(rest[:8])} {loop} {' '.join(rest[8:])} {loop}")


@given(st.text(max_size=200))
def test_every_text_has_exactly_one_outcome(answer):
    assert classify(answer, JUDGE) in get_args(Outcome)


@given(st.lists(st.text("abcdefgh", min_size=2, max_size=8), min_size=1, max_size=40, unique=True))
def test_different_words_are_never_incoherent(words):
    assert not is_incoherent(" ".join(words))


def test_the_rule_has_a_version():
    assert RULE_VERSION
