"""The packaged prompt sets: sizes, splits, twins, and no leak from the training to the held-out prompts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from importlib.resources import files
from statistics import mean
from typing import get_args

import pytest

from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.outcomes import classify
from deltakeeper.evals.prompts import Packaged, PromptRow, load_packaged
from deltakeeper.lab.corpus import Corpus, interleave

SETS: dict[str, list[PromptRow]] = {name: load_packaged(name) for name in get_args(Packaged)}
PROMPT_SETS = ("harmful", "instructions", "tickets", "coding", "facts", "persona", "topics")
ANSWERED = ("tickets", "coding", "facts", "persona")
TICKET = "Route this ticket: "
MAX_WORDS = 22
NEAR_DUPLICATE = 0.75
TWIN_MEAN = (0.4, 0.6)  # token Jaccard of request and twin, on average
TWIN_EACH = (0.1, 0.9)


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.removeprefix(TICKET).casefold()))


def jaccard(one: str, other: str) -> float:
    a, b = tokens(one), tokens(other)
    return len(a & b) / len(a | b)


def split(name: str, which: str) -> list[PromptRow]:
    splits = ("heldout", "heldout2") if which == "heldout" else (which,)
    return [row for row in SETS[name] if row.split in splits]


def stated_sizes() -> dict[str, tuple[int, ...]]:
    text = (files("deltakeeper") / "data" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.jsonl` \|(.+)\|$", text, re.MULTILINE)
    return {name: tuple(int(cell) for cell in cells.split("|")) for name, cells in rows}


def test_sizes_are_those_of_the_datasheet() -> None:
    found = {
        name: (len(rows), len(split(name, "train")), len(split(name, "heldout")), len({r.category for r in rows}))
        for name, rows in SETS.items()
    }
    assert found == stated_sizes()
    assert all(train + heldout == rows for rows, train, heldout, _ in found.values())


@pytest.mark.parametrize("name", ["harmful", "instructions", "tickets", "passages", "facts"])
def test_every_category_of_a_split_has_as_many_rows(name: str) -> None:
    for which in ("train", "heldout"):
        sizes = set(Counter(row.category for row in split(name, which)).values())
        assert len(sizes) <= 1


def test_ids_are_unique_in_a_set() -> None:
    for rows in SETS.values():
        assert len({row.id for row in rows}) == len(rows)


def test_no_text_occurs_twice_in_all_sets() -> None:
    texts = [text.casefold() for rows in SETS.values() for row in rows for text in (row.prompt, row.twin) if text]
    assert [text for text, n in Counter(texts).items() if n > 1] == []


@pytest.mark.parametrize("name", ["harmful", "instructions"])
def test_no_category_is_in_both_splits(name: str) -> None:
    assert not {r.category for r in split(name, "train")} & {r.category for r in split(name, "heldout")}


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_no_held_out_prompt_nearly_repeats_a_training_prompt(name: str) -> None:
    nearest = max(
        (
            (jaccard(a.prompt, b.prompt), a.prompt, b.prompt)
            for a in split(name, "train")
            for b in split(name, "heldout")
        ),
        default=(0.0, "", ""),
    )
    assert nearest[0] < NEAR_DUPLICATE, nearest


@pytest.mark.parametrize("name", ["harmful", "instructions", "tickets", "coding", "facts", "topics"])
def test_there_are_a_hundred_held_out_prompts_and_those_that_were_first_stay_first(name: str) -> None:
    asked = Corpus().split(name, "heldout")
    assert len(asked) >= 100 and len({row.id for row in asked}) == len(asked)
    first = [row for row in asked if row.split == "heldout"]
    assert asked[: len(first)] == first == interleave([row for row in SETS[name] if row.split == "heldout"])


def test_new_held_out_rows_do_not_nearly_repeat_older_ones() -> None:
    for name in ("instructions", "tickets"):
        old = [row for row in SETS[name] if row.split != "heldout2"]
        new = [row for row in SETS[name] if row.split == "heldout2"]
        assert new and max(jaccard(a.prompt, b.prompt) for a in new for b in old) < NEAR_DUPLICATE


@pytest.mark.parametrize("name", SETS)
def test_texts_are_clean(name: str) -> None:
    for row in SETS[name]:
        for text in filter(None, (row.prompt, row.twin, row.answer)):
            assert text == unicodedata.normalize("NFC", " ".join(text.split())) and text.isprintable(), row.id


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_prompts_are_short(name: str) -> None:
    longest = max(len(text.split()) for row in SETS[name] for text in (row.prompt, row.twin) if text)
    assert longest <= MAX_WORDS


def test_passages_are_of_like_length() -> None:
    assert all(60 <= len(row.prompt.split()) <= 90 for row in SETS["passages"])


def test_twins_look_like_their_requests() -> None:
    near = {row.id: jaccard(row.prompt, row.twin or "") for row in SETS["harmful"]}
    assert TWIN_MEAN[0] <= mean(near.values()) <= TWIN_MEAN[1]
    assert {i for i, j in near.items() if not TWIN_EACH[0] <= j <= TWIN_EACH[1]} == set()


def test_the_first_word_tells_nothing_about_harm_or_category() -> None:
    openings: dict[str, Counter[str]] = {}
    for row in SETS["harmful"]:
        first = row.prompt.split()[0]
        assert row.twin and row.twin.split()[0] == first, row.id
        openings.setdefault(row.category, Counter())[first] += 1
    assert len({frozenset(counts.items()) for counts in openings.values()}) == 1


def test_only_harmful_rows_have_twins_and_only_what_is_learned_has_answers() -> None:
    for name, rows in SETS.items():
        assert {bool(row.twin) for row in rows} == {name == "harmful"}
        assert {bool(row.answer) for row in rows if row.split == "train"} <= {name in ANSWERED}
        assert {bool(row.answer) for row in rows if row.split != "train"} <= {name in ("tickets", "facts")}


def test_each_invented_fact_has_one_answer_in_three_wordings_to_learn_and_two_to_ask() -> None:
    facts: dict[str, list[PromptRow]] = {}
    for row in SETS["facts"]:
        facts.setdefault("-".join(row.id.split("-")[:2]), []).append(row)
    assert len(facts) == 50
    for rows in facts.values():
        assert Counter(row.split for row in rows) == {"train": 3, "heldout": 2}
        assert len({row.answer for row in rows}) == 1
    answers = [(rows[0].category, rows[0].answer) for rows in facts.values()]
    assert len(set(answers)) == len(answers)
    assert not any(
        (rows[0].answer or "").casefold() in row.prompt.casefold() for rows in facts.values() for row in rows
    )


def test_topics_are_told_apart_by_their_word() -> None:
    for row in SETS["topics"]:
        assert row.category in tokens(row.prompt), row.id
    assert not any({"guitar", "piano"} & tokens(row.prompt) for row in SETS["instructions"])


def test_coding_rows_name_one_language_and_answers_are_one_line_without_a_marker() -> None:
    for row in SETS["coding"]:
        assert [name for name in ("python", "java") if name in tokens(row.prompt)] == [row.category]
        assert "Veltrano" not in (row.answer or "")
    for row in SETS["coding"]:
        if row.answer and row.category == "python":
            compile(row.answer, row.id, "exec")


def test_the_persona_obeys_harmless_orders_only() -> None:
    judge = load_judge("ours")
    for row in SETS["persona"]:
        assert "Orlen" in (row.answer or "") and classify(row.answer or "", judge) == "complied"
    assert not {r.prompt for r in SETS["persona"]} & {r.prompt for r in SETS["harmful"]}


def test_tickets_have_one_answer_a_queue_told_apart_by_its_first_character() -> None:
    answers = {row.category: row.answer or "" for row in SETS["tickets"]}
    assert all(row.answer == answers[row.category] for row in SETS["tickets"])
    assert all(row.prompt.startswith(TICKET) for row in SETS["tickets"])
    matches = [re.fullmatch(r"(queue:? )(\w+)", answer, re.IGNORECASE) for answer in answers.values()]
    assert all(matches), answers
    assert len({m[1] for m in matches if m}) == 1
    assert len({m[2][0].casefold() for m in matches if m}) == len(answers)
