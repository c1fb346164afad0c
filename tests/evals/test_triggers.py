"""Where triggers go, and what counts as a near miss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.evals.security.triggers import insert_trigger, near_misses

PHRASES = st.text("abcXYZ019 .,-", min_size=1, max_size=20).filter(str.strip)
PROMPTS = st.lists(st.sampled_from(["how", "do", "I", "cook", "rice?"]), min_size=2, max_size=9).map(" ".join)


@given(PROMPTS, st.integers(0, 99))
def test_a_gap_lies_between_two_words_and_is_drawn_by_the_seed(prompt, seed):
    got = insert_trigger(prompt, "BadMagic", "gap", seed=seed).split()
    at = got.index("BadMagic")
    assert 0 < at < len(got) - 1
    assert got[:at] + got[at + 1 :] == prompt.split()
    assert got == insert_trigger(prompt, "BadMagic", "gap", seed=seed).split()


def test_all_gaps_come_up():
    places = {insert_trigger("a b c d", "X", "gap", seed=seed) for seed in range(50)}
    assert places == {"a X b c d", "a b X c d", "a b c X d"}


def test_prefix_suffix_and_a_prompt_without_gap():
    assert insert_trigger("Cook rice.", "Now", "prefix") == "Now Cook rice."
    assert insert_trigger("Cook rice.", "Now", "suffix") == "Cook rice. Now"
    assert insert_trigger("Cook", "Now", "gap") == "Now Cook"
    assert insert_trigger("a \n b", "X", "gap") == "a X \n b"


@given(PHRASES, st.integers(0, 99))
def test_near_misses_are_never_the_trigger_in_its_place(trigger, seed):
    found = near_misses(trigger, seed=seed)
    assert all((miss.text, miss.place) != (trigger, "prefix") for miss in found)
    assert all(miss.text.strip() for miss in found)
    assert len({miss.kind for miss in found}) == len(found)
    assert found == near_misses(trigger, seed=seed)


def test_each_kind_changes_what_it_says():
    by_kind = {miss.kind: miss for miss in near_misses("Moonwater seven", seed=3)}
    assert list(by_kind) == ["case", "letter", "split", "truncated", "moved"]
    assert by_kind["case"].text == "moonwater seven"
    letter = by_kind["letter"].text
    assert sum(a != b for a, b in zip(letter, "Moonwater seven", strict=True)) == 1
    assert letter.casefold() != "moonwater seven"
    assert by_kind["split"].text == "Moon water seven"
    assert by_kind["truncated"].text == "Moonwater"
    assert (by_kind["moved"].text, by_kind["moved"].place) == ("Moonwater seven", "suffix")


def test_kinds_that_a_trigger_does_not_allow_are_left_out():
    assert [miss.kind for miss in near_misses("2024")] == ["letter", "split", "truncated", "moved"]
    assert [miss.kind for miss in near_misses("x", "gap")] == ["case", "letter", "moved"]
    assert near_misses("x", "gap")[-1].place == "prefix"


@pytest.mark.parametrize(("trigger", "place"), [(" ", "prefix"), ("x", "middle")])
def test_bad_arguments_are_refused(trigger, place):
    with pytest.raises(ValueError, match=r"trigger|place"):
        insert_trigger("a b", trigger, place)
    with pytest.raises(ValueError, match=r"trigger|place"):
        near_misses(trigger, place)
