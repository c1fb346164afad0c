"""Scores of an arm with their intervals, and what an arm loses against another one on the same items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.evals.stats import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Floats,
    Statistic,
    mcnemar_exact,
    no_narrower,
    non_inferiority_bound,
    paired_bootstrap,
    resampled_means,
    wilson,
    zero_hit_bound,
)
from deltakeeper.evals.utility.records import ItemRecord, Measure, by_measure, pair

MARGIN = 0.1
"""The loss of utility that is asked about: a tenth of the reference's score (arXiv 2411.19530)."""
RATES = {
    "nll": ("tokens", 1.0, "perplexity"),
    "word_perplexity": ("word_perplexity.count", -1.0, "word_perplexity"),
    "byte_perplexity": ("byte_perplexity.count", -1.0, "byte_perplexity"),
}
"""Metrics whose sum is divided by that of another one: which one, the sign of a negative likelihood, and a name."""
_ENTRIES = 20_000_000
"""Numbers that a bootstrap may hold: 160 MB."""


@dataclass(frozen=True)
class Summary:
    """The score of an arm in one measure.

    Attributes:
        measure: what was measured.
        n: number of items.
        score: mean of the items with its 95 % interval (Wilson's for right and wrong, else a bootstrap over items);
            for likelihoods the perplexity.
        truncated: items whose prompt was cut.
    """

    measure: Measure
    n: int
    score: Estimate
    truncated: int


@dataclass(frozen=True)
class Comparison:
    """What an arm loses against a reference on the same items, in one measure.

    Attributes:
        measure: what was measured.
        n: number of items.
        reference: score of the reference.
        other: score of the arm.
        difference: `other - reference` with its paired 95 % interval, for scores within 0 and 1 no narrower than if
            no item had turned; of log-perplexities (nats a token) for perplexity.
        lost: items that only the reference has right; None where items are not right or wrong.
        gained: items that only the arm has right; likewise.
        p: exact McNemar p-value of the two; likewise.
        loss: `1 - other / reference`, for perplexity `other / reference - 1`; None if the reference is zero.
        bound: upper end of the one-sided 95 % interval of the loss, by a bootstrap over items, and for right and wrong
            no less than what so few items lost leave open; None if it cannot be estimated.
    """

    measure: Measure
    n: int
    reference: float
    other: float
    difference: Estimate
    lost: int | None
    gained: int | None
    p: float | None
    loss: float | None
    bound: float | None

    def within(self, margin: float = MARGIN) -> bool:
        """Whether the loss is shown to be at most `margin`, at 95 %."""
        return self.bound is not None and self.bound <= margin


class _Column(NamedTuple):
    """Items of one measure; `weights` are what the sum is divided by, None for a mean."""

    records: Sequence[ItemRecord]
    values: Floats
    weights: Floats | None


def summarise(records: Iterable[ItemRecord]) -> list[Summary]:
    """Scores of one arm.

    Args:
        records: all of one arm.

    Raises:
        DataError: an item has two values, or likelihoods come without counts.
    """
    found = []
    for measure, column in _columns(records).items():
        n = len(column.records)
        if column.weights is None and _binary(column.values):
            right = int(column.values.sum())
            score = Estimate(right / n, *wilson(right, n))
        else:
            score = paired_bootstrap(
                _statistic(column.values, column.weights),
                n,
                resamples=_resamples(n),
                clusters=[record.doc_hash for record in column.records],
            )
        found.append(Summary(measure, n, score, sum(record.truncated for record in column.records)))
    return found


def compare(
    reference: Iterable[ItemRecord], other: Iterable[ItemRecord], *, same_prompts: bool = True
) -> list[Comparison]:
    """What one arm loses against another, measure by measure; equal items of a file are resampled together.

    The relative loss is that of the score as it is: a benchmark on which the reference guesses cannot show a loss.

    Args:
        reference: records of the arm that must not be undercut.
        other: records of the arm under test.
        same_prompts: see `pair`.

    Raises:
        DataError: the arms were not asked the same items in the same way.
    """
    first, second = _columns(reference), _columns(other)
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise DataError(f"only one of two arms has {odd.metric} of {odd.task}; evaluate both on the same tasks.")
    return [_compare(measure, first[measure], second[measure], same_prompts) for measure in first]


def _compare(measure: Measure, reference: _Column, other: _Column, same_prompts: bool) -> Comparison:
    pairs = pair(reference.records, other.records, same_prompts=same_prompts)
    n, clusters = len(pairs), [a.doc_hash for a, _ in pairs]
    old, new = (_statistic(column.values, column.weights) for column in (reference, other))
    here = np.ones((1, n))
    before, after = float(old(here)[0]), float(new(here)[0])
    lost = gained = p = None
    if reference.weights is not None:
        difference = paired_bootstrap(
            lambda counts: np.log(new(counts)) - np.log(old(counts)), n, resamples=_resamples(n), clusters=clusters
        )
        loss: float | None = after / before - 1
        bound = paired_bootstrap(
            lambda counts: new(counts) / old(counts) - 1,
            n,
            resamples=_resamples(n),
            clusters=clusters,
            level=2 * LEVEL - 1,
        ).high
    else:
        difference = paired_bootstrap(
            lambda counts: new(counts) - old(counts), n, resamples=_resamples(n), clusters=clusters
        )
        if not any(((column.values < 0) | (column.values > 1)).any() for column in (reference, other)):
            difference = no_narrower(difference, zero_hit_bound(len(set(clusters))), (-1, 1))
        loss = 1 - after / before if before else None
        bound = non_inferiority_bound(
            reference.values, other.values, resamples=_resamples(n), clusters=clusters, level=LEVEL
        )
        if _binary(reference.values) and _binary(other.values):
            lost = int(((reference.values == 1) & (other.values == 0)).sum())
            gained = int(((reference.values == 0) & (other.values == 1)).sum())
            p = mcnemar_exact(lost, gained)
            bound = None if bound is None else max(bound, _few_flips(lost, gained, n) / before)
    return Comparison(measure, n, before, after, difference, lost, gained, p, loss, bound)


def _few_flips(lost: int, gained: int, n: int) -> float:
    """Upper end of the one-sided 95 % interval of `lost - gained` as a share, from Wilson's for the items lost.

    A bootstrap of items of which none flipped never sees a flip, however few items there are.
    """
    return wilson(lost, n, 2 * LEVEL - 1).high - gained / n


def _columns(records: Iterable[ItemRecord]) -> dict[Measure, _Column]:
    found = by_measure(records)
    columns = {}
    counts = {weight for weight, _, _ in RATES.values()}
    for measure, rows in found.items():
        values = np.array([row.value for row in rows])
        if measure.metric in RATES:
            weight, sign, name = RATES[measure.metric]
            counted = found.get(measure._replace(metric=weight), [])
            if [row.doc_id for row in counted] != [row.doc_id for row in rows]:
                raise DataError(f"{measure.metric} of {measure.task} comes without its '{weight}'; keep all records.")
            weights = np.array([row.value for row in counted])
            columns[measure._replace(metric=name)] = _Column(rows, sign * values, weights)
        elif measure.metric not in counts:
            columns[measure] = _Column(rows, values, None)
    return columns


def _statistic(values: Floats, weights: Floats | None) -> Statistic:
    if weights is None:
        return lambda counts: resampled_means(values, counts)
    return lambda counts: np.exp(counts @ values / (counts @ weights))


def _binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _resamples(n: int) -> int:
    return max(1000, min(RESAMPLES, _ENTRIES // n))
