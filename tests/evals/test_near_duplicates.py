"""Near-duplicates against a slow closure over all pairs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.evals.stats import near_duplicate_clusters

WORDS = st.lists(st.sampled_from(["make", "a", "cake", "for", "tea", "Tea!"]), max_size=6).map(" ".join)


def slow(prompts, threshold):
    sets = {id: set(re.findall(r"\w+", text.casefold())) for id, text in prompts.items()}
    cluster = {id: {id} for id in prompts}
    for one in prompts:
        for other in prompts:
            a, b = sets[one], sets[other]
            if a and b and 5 * len(a & b) >= round(5 * threshold) * len(a | b) and cluster[one] is not cluster[other]:
                merged = cluster[one] | cluster[other]
                for id in merged:
                    cluster[id] = merged
    return {id: min(members) for id, members in cluster.items()}


@given(st.lists(WORDS, max_size=25), st.sampled_from([0.2, 0.6, 1.0]))
def test_clusters_equal_a_closure_over_all_pairs(texts, threshold):
    prompts = {f"p{i:02d}": text for i, text in enumerate(texts)}
    assert near_duplicate_clusters(prompts, threshold) == slow(prompts, threshold)


def test_blocks_of_rows_see_each_other(monkeypatch):
    prompts = {f"p{i:02d}": f"one two three four {i % 3} {'x' * (i // 3 + 1)} y{i % 3} z{i % 3}" for i in range(12)}
    whole = near_duplicate_clusters(prompts)
    monkeypatch.setattr("deltakeeper.evals.stats.near_duplicates._ROWS", 2)
    assert near_duplicate_clusters(prompts) == whole == slow(prompts, 0.6)
    assert len(set(whole.values())) == 3


def test_a_chain_is_one_cluster_and_wordless_prompts_are_apart():
    chain = {"a": "w1 w2 w3 w4", "b": "w2 w3 w4 w5", "c": "w3 w4 w5 w6", "d": "?!", "e": "?!"}
    assert near_duplicate_clusters(chain) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
    assert near_duplicate_clusters({}) == {}


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicate_clusters({"a": "b"}, threshold)
