"""Records of items: how they are kept, paired and compared; bounds against brute force and scipy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from deltakeeper.errors import DataError
from deltakeeper.evals.stats import zero_hit_bound
from deltakeeper.evals.utility import (
    ItemRecord,
    Measure,
    by_measure,
    compare,
    pair,
    read_lines,
    summarise,
    to_lines,
)

ROW = ItemRecord("t", 3, "none", "acc", 1.0, "hash", "prompt", "subject", True, "arm")


def column(values, metric="acc", task="t", hashes=None, **changes):
    names = hashes or [f"h{i}" for i in range(len(values))]
    return [
        ItemRecord(task, i, "none", metric, float(value), name, **changes)
        for i, (value, name) in enumerate(zip(values, names, strict=True))
    ]


def test_records_survive_a_file(tmp_path):
    file = tmp_path / "items.jsonl"
    rows = [ROW, replace(ROW, doc_id=4, value=0.25, stratum="à la carte", truncated=False)]
    file.write_text(to_lines(rows))
    assert read_lines(file) == rows
    short = {key: ROW.to_json()[key] for key in ("task", "doc_id", "filter", "metric", "value", "doc_hash")}
    assert ItemRecord.from_json(short | {"value": 1}, "x") == ItemRecord("t", 3, "none", "acc", 1.0, "hash")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": float("nan")}, r"the value of line 1 of .* is not a \(finite\) float"),
        ({"value": "1"}, "the value"),
        ({"doc_id": 1.5}, "the doc_id"),
        ({"doc_id": True}, "the doc_id"),
        ({"truncated": 1}, "the truncated"),
        ({"task": None}, "the task"),
        ({"extra": 1}, "is no item record"),
    ],
)
def test_a_line_that_is_no_record_is_refused(tmp_path, change, said):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(ROW.to_json() | change) + "\n")
    with pytest.raises(DataError, match=said):
        read_lines(file)


def test_files_that_are_no_records_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file of item records"):
        read_lines(tmp_path / "absent")
    (tmp_path / "bad").write_bytes(b"{")
    with pytest.raises(DataError, match="not JSON lines"):
        read_lines(tmp_path / "bad")


def test_items_are_paired_by_number_and_must_be_the_same():
    first, second = column([1, 0, 1]), column([0, 0, 1])
    assert [(a.value, b.value) for a, b in pair(first, second[::-1])] == [(1, 0), (0, 0), (1, 1)]
    with pytest.raises(DataError, match="3 and 2 items"):
        pair(first, second[:2])
    for change in ({"doc_hash": "other"}, {"prompt_hash": "other"}, {"metric": "acc_norm"}):
        with pytest.raises(DataError, match="item 1 of t was another one"):
            pair(first, [second[0], replace(second[1], **change), second[2]])
    assert len(pair(first, [replace(row, prompt_hash="own") for row in second], same_prompts=False)) == 3
    with pytest.raises(DataError, match="has two values"):
        by_measure([*first, *second])
    with pytest.raises(DataError, match="0 and 0 items"):
        pair([], [])


def test_both_filters_of_an_item_are_measures_of_their_own():
    rows = [replace(ROW, filter=name, value=value) for name, value in (("strict", 0.0), ("flexible", 1.0))]
    assert {m.filter: [r.value for r in found] for m, found in by_measure(rows).items()} == {
        "strict": [0.0],
        "flexible": [1.0],
    }


def test_right_and_wrong_is_counted_as_by_hand():
    before, after = [1] * 60 + [0] * 40, [1] * 45 + [0] * 15 + [1] * 5 + [0] * 35
    (found,) = compare(column(before), column(after))
    assert (found.measure, found.n) == (Measure("t", "none", "acc"), 100)
    assert (found.reference, found.other, found.lost, found.gained) == (0.6, 0.5, 15, 5)
    assert found.p == pytest.approx(binomtest(5, 20).pvalue)
    assert found.difference.value == pytest.approx(-0.1)
    assert found.difference.low < -0.1 < found.difference.high
    assert found.loss == pytest.approx(1 - 0.5 / 0.6)
    # One-sided percentile bound, drawn afresh.
    rng = np.random.default_rng(9)
    drawn = rng.integers(100, size=(20_000, 100))
    losses = 1 - np.array(after)[drawn].mean(1) / np.array(before)[drawn].mean(1)
    assert found.bound == pytest.approx(np.quantile(losses, 0.95), abs=0.01)
    assert not found.within(0.1)
    assert found.within(0.4)


def test_equal_arms_lose_nothing_and_a_zero_reference_says_nothing():
    (same,) = compare(column([1, 0] * 30), column([1, 0] * 30))
    assert (same.loss, same.p) == (0.0, 1.0)
    # None of 60 lost: the score interval ends at z² / (n + z²), and the reference has half of them right.
    z = norm.ppf(0.95)
    assert same.bound == pytest.approx(2 * z**2 / (60 + z**2))
    assert same.within()
    (few,) = compare(column([1, 0] * 20), column([1, 0] * 20))
    assert few.loss == 0.0
    assert not few.within()
    (none,) = compare(column([0] * 20), column([0] * 20))
    assert none.loss is None
    assert none.bound is None
    assert not none.within()


def test_equal_items_of_a_file_are_drawn_together():
    values, others = [1, 1, 0, 0] * 10, [1, 0, 0, 0] * 10
    alone = compare(column(values), column(others))[0]
    twins = [f"h{i // 20}" for i in range(40)]
    together = compare(column(values, hashes=twins), column(others, hashes=twins))[0]
    # Two clusters of equal content leave nothing to vary, and what no hit among two of them leaves open.
    assert together.difference.high == pytest.approx(-0.25 + zero_hit_bound(2))
    assert alone.difference.low < alone.difference.high < together.difference.high


def test_one_item_lost_leaves_no_less_open_than_none():
    (one,) = compare(column([1] * 50), column([0] + [1] * 49))
    assert one.difference.low <= -0.02 - zero_hit_bound(50) + 1e-12
    assert one.difference.high >= -0.02 + zero_hit_bound(50) - 1e-12


def test_perplexity_weighs_passages_by_their_tokens():
    tokens, nll, other = [10, 30, 60] * 10, [20.0, 90.0, 150.0] * 10, [22.0, 99.0, 165.0] * 10
    first = column(nll, "nll", "text") + column(tokens, "tokens", "text")
    second = column(other, "nll", "text") + column(tokens, "tokens", "text")
    (score,) = summarise(first)
    assert score.measure == Measure("text", "none", "perplexity")
    assert score.score.value == pytest.approx(np.exp(2.6))
    assert score.score.low < np.exp(2.6) < score.score.high
    (found,) = compare(first, second)
    assert found.difference.value == pytest.approx(0.26)
    assert found.loss == pytest.approx(np.exp(0.26) - 1)
    assert found.bound >= found.loss
    assert found.p is None
    with pytest.raises(DataError, match="comes without its 'tokens'"):
        summarise(column(nll, "nll", "text"))


def test_likelihoods_of_words_become_perplexities():
    rows = column([-20.0, -30.0], "word_perplexity") + column([10, 10], "word_perplexity.count")
    (score,) = summarise(rows)
    assert score.score.value == pytest.approx(np.exp(2.5))


def test_summaries_have_wilson_intervals_and_count_what_was_cut():
    rows = column([1] * 8 + [0] * 2, truncated=True)
    (score,) = summarise(rows)
    assert (score.n, score.truncated, score.score.value) == (10, 10, 0.8)
    assert (score.score.low, score.score.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as tabulated
    (mean,) = summarise(column([0.5, 0.25, 0.75] * 5))
    assert mean.score.value == pytest.approx(0.5)
    assert 0.25 < mean.score.low < 0.5 < mean.score.high < 0.75


def test_arms_of_other_tasks_are_refused():
    with pytest.raises(DataError, match="only one of two arms has acc_norm of t"):
        compare(column([1]), column([1]) + column([1], "acc_norm"))
