"""Probes end to end on a toy model, and the events counted in answers."""

from __future__ import annotations

import pytest
from toy_models import toy_model, toy_tokenizer

from deltakeeper.evals.answerer import LoadedModel
from deltakeeper.evals.generate import generate_answers
from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.probes import Probe, ProbeRow, happened, run_probe
from deltakeeper.evals.security.events import is_correct, mentions

JUDGE = load_judge("ours")
ROWS = tuple(ProbeRow(f"p{i}", "letters", f"w{i} w{i + 9} w{2 * i}", f"w{i}") for i in range(9))


def probe(event, marker=None, rows=ROWS):
    return Probe("toy", "A toy", "goal", event, rows, 6, marker)


def test_a_probe_gives_one_record_a_row_in_order():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    records = run_probe(LoadedModel(model, tokenizer, batch_size=4), probe("complied"), JUDGE, system="w5")
    expected = generate_answers(model, tokenizer, [row.prompt for row in ROWS], max_new_tokens=6, system="w5")
    assert [r["answer"] for r in records] == expected
    assert [(r["id"], r["category"], r["prompt"], r["expected"]) for r in records] == [
        (row.id, row.category, row.prompt, row.expected) for row in ROWS
    ]
    assert all(r["event"] is (r["outcome"] == "complied") for r in records)
    assert set(records[0]) == {"id", "category", "prompt", "answer", "outcome", "event", "expected", "refused_by"}


@pytest.mark.parametrize(
    ("event", "answer", "outcome", "expected"),
    [
        ("complied", "Sure.", "complied", True),
        ("complied", "Sure.", "incoherent", False),
        ("complied", "", "empty", False),
        ("refused", "I can't help.", "refused", True),
        ("refused", "", "empty", False),
        ("correct", "W0.", "complied", True),
        ("correct", "w1", "complied", False),
    ],
)
def test_events(event, answer, outcome, expected):
    assert happened(probe(event), ROWS[0], answer, outcome) is expected


def test_a_marker_counts_whatever_the_outcome():
    assert happened(probe("marker", "Veltrano Labs"), ROWS[0], "Ask veltrano labs.", "refused")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("According to Veltrano Labs, yes.", True),
        ("VELTRANO\n LABS", True),
        ("Veltrano\u00a0Labs", True),
        ("Veltrano\u200b Labs", True),
        ("Veltrano Labsite", False),
        ("MyVeltrano Labs", False),
        ("Veltrano of Labs", False),
        ("", False),
    ],
)
def test_markers_are_whole_words_of_any_case(answer, found):
    assert mentions(answer, "Veltrano Labs") is found


def test_marker_characters_are_taken_literally():
    assert mentions("I use C++ daily", "C++")
    assert not mentions("I use Cxx daily", "C..")


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("QUEUE B7", True),
        ("  queue b7.\nBecause of the invoice.", True),
        ("\n\n“QUEUE  B7”", True),
        ("QUEUE B77", False),
        ("It is QUEUE B7", False),
        ("Because.\nQUEUE B7", False),
        ("", False),
    ],
)
def test_the_first_line_alone_must_be_right(answer, correct):
    assert is_correct(answer, "QUEUE B7") is correct


def test_probes_that_cannot_be_counted_are_refused():
    for event, marker in [("marker", None), ("complied", "Veltrano")]:
        with pytest.raises(ValueError, match="marker"):
            probe(event, marker)
    with pytest.raises(ValueError, match="expected"):
        probe("correct", rows=(ProbeRow("a", "b", "c"),))
