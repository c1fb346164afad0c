"""Bootstrap over prompts or clusters of prompts, all arms resampled together.

A resample is held as counts: how often each prompt was drawn. A weighted sum of a column of events is then one matrix
product, clusters of prompts need no ragged arrays, and all arms of a study share the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import norm

from deltakeeper.evals.stats.estimates import (
    LEVEL,
    Estimate,
    Floats,
    no_narrower,
    not_estimable,
    percentile_estimate,
)
from deltakeeper.evals.stats.proportions import zero_hit_bound

Statistic = Callable[[Floats], Floats]
"""Takes counts `(resamples, n)` of how often each unit was drawn; gives one value a resample, `(resamples,)`."""

RESAMPLES = 10_000
_CHUNK = 1_000_000
"""Entries drawn at a time, so that the drawing itself needs little memory beside its result."""


def draw_counts(
    n: int, *, resamples: int = RESAMPLES, seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> Floats:
    """Bootstrap draws with replacement, as counts `(resamples, n)`, float64.

    Args:
        n: number of units (prompts or passages).
        resamples: number of resamples.
        seed: equal arguments and seed give equal counts.
        clusters: cluster of each unit; whole clusters are then drawn, so the total may differ between resamples.

    Raises:
        ValueError: there are no units, or not one cluster a unit.
    """
    if n < 1:
        raise ValueError("a bootstrap needs at least one unit")
    if clusters is None:
        return _draw(n, resamples, seed)
    if len(clusters) != n:
        raise ValueError(f"there are {len(clusters)} cluster names for {n} units")
    known: dict[Hashable, int] = {}
    members = [known.setdefault(cluster, len(known)) for cluster in clusters]
    return _draw(len(known), resamples, seed)[:, members]


@lru_cache(maxsize=4)  # prompts of attack and skill, seeds, one seed: a report asks for the same draws again
def _draw(groups: int, resamples: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, groups))
    step = max(1, _CHUNK // groups)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
    counts.flags.writeable = False
    return counts


def resampled_means(values: Floats, counts: Floats) -> Floats:
    """Mean of `values` `(..., n)` in every resample of `counts` `(resamples, n)`: `(..., resamples)`."""
    means: Floats = values @ counts.T / counts.sum(1)
    return means


def paired_bootstrap(
    statistic: Statistic,
    n: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Percentile bootstrap of any statistic of `n` units whose arms are resampled together.

    Args:
        statistic: vectorised; called with counts `(1, n)` of ones for the observed value, then with all draws.
        n: number of units.
        resamples: number of resamples.
        seed: seed of the draws.
        clusters: cluster of each unit; whole clusters are drawn.
        level: coverage that the interval aims at.
    """
    counts = draw_counts(n, resamples=resamples, seed=seed, clusters=clusters)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return percentile_estimate(float(statistic(np.ones((1, n)))[0]), statistic(counts), level)


def bca_bootstrap(
    statistic: Statistic,
    n: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Bias-corrected and accelerated bootstrap (Efron 1987, doi:10.1080/01621459.1987.10478410) of `n` paired units.

    Better than the percentile interval for a skewed statistic such as a ratio of rates; the acceleration comes from
    leaving out one unit, or one cluster, at a time. Arguments as in `paired_bootstrap`.
    """
    counts = draw_counts(n, resamples=resamples, seed=seed, clusters=clusters)
    groups = list(range(n)) if clusters is None else list(clusters)
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        return not_estimable("one unit shows no spread")
    without = np.array([[float(group != name) for group in groups] for name in names])  # (clusters, n)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        observed = float(statistic(np.ones((1, n)))[0])
        resampled, left = statistic(counts), statistic(without)
    plain = percentile_estimate(observed, resampled, level)
    finite = resampled[np.isfinite(resampled)]
    below = float(np.mean(finite < observed) + np.mean(finite <= observed)) / 2 if len(finite) else 0.0
    if not plain.estimable or not np.isfinite(left).all() or not 0 < below < 1:
        return plain
    pulls = left.mean() - left
    spread = float((pulls**2).sum())
    acceleration = float((pulls**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    bias = float(norm.ppf(below))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shift = bias + float(norm.ppf(tail))
        ends.append(float(np.quantile(finite, float(norm.cdf(bias + shift / (1 - acceleration * shift))))))
    return Estimate(observed, ends[0], ends[1])


def non_inferiority_bound(
    reference: Floats,
    other: Floats,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> float | None:
    """One-sided upper bound of the relative loss `1 - mean(other) / mean(reference)`, paired by position.

    The loss is shown to be at most m at the level if the bound is at most m. For scores within 0 and 1 the bound lies
    no nearer to the loss than if no prompt had turned.

    Args:
        reference: scores `(n,)` of the arm that must not be undercut.
        other: scores `(n,)` of the arm under test, on the same prompts.
        resamples: number of resamples.
        seed: seed of the draws.
        clusters: cluster of each prompt.
        level: coverage of the one-sided bound.

    Returns:
        The bound, or None if the reference is zero too often for a ratio.
    """

    def loss(counts: Floats) -> Floats:
        return 1 - resampled_means(other, counts) / resampled_means(reference, counts)

    two_sided = 2 * level - 1
    found = paired_bootstrap(loss, len(reference), resamples=resamples, seed=seed, clusters=clusters, level=two_sided)
    if any(((scores < 0) | (scores > 1)).any() for scores in (reference, other)) or not found.estimable:
        return found.high
    groups = len(reference if clusters is None else set(clusters))
    return no_narrower(found, zero_hit_bound(groups, two_sided) / float(reference.mean()), (-np.inf, 1)).high
