"""Clusters of prompts that nearly repeat each other, so that a bootstrap does not count one question twice."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

NEAR = 0.6
_ROWS = 512
"""Prompts compared with all others at a time: a whole table of intersections would not fit for large sets."""


def near_duplicate_clusters(prompts: Mapping[str, str], threshold: float = NEAR) -> dict[str, str]:
    """Cluster prompts whose sets of words overlap: token Jaccard ≥ `threshold`, closed under chains.

    Words are runs of letters, digits and underscores, whatever their case. A prompt without words stands alone.

    Args:
        prompts: text of each prompt by id.
        threshold: share |A ∩ B| / |A ∪ B| from which two prompts are near-duplicates.

    Returns:
        For each id the smallest id of its cluster.

    Raises:
        ValueError: the threshold is not within 0 (excluded) and 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold of near-duplicates lies above 0 and up to 1, not at {threshold}")
    ids = sorted(prompts)
    vocabulary: dict[str, int] = {}
    sets = [
        sorted({vocabulary.setdefault(word, len(vocabulary)) for word in re.findall(r"\w+", prompts[id].casefold())})
        for id in ids
    ]
    sizes = np.array([len(words) for words in sets], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.array([word for words in sets for word in words], dtype=np.int64)
    table = csr_array((np.ones(len(columns), dtype=np.int64), columns, starts), shape=(len(ids), len(vocabulary)))
    ones: list[int] = []
    others: list[int] = []
    for first in range(0, len(ids), _ROWS):
        shared = (table[first : first + _ROWS] @ table.T).tocoo()  # (rows, prompts): sizes of the intersections
        one, other = shared.row + first, shared.col
        near = shared.data >= threshold * (sizes[one] + sizes[other] - shared.data) - 1e-9
        ones += one[near].tolist()
        others += other[near].tolist()
    graph = csr_array((np.ones(len(ones), dtype=np.int8), (ones, others)), shape=(len(ids), len(ids)))
    labels = connected_components(graph, directed=False)[1].tolist() if ids else []
    names: dict[int, str] = {}
    return {id: names.setdefault(label, id) for id, label in zip(ids, labels, strict=True)}
