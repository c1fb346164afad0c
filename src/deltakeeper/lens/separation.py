"""How far two groups of numbers lie apart, layer by layer: effect in pooled standard deviations, and AUC."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from deltakeeper.lens.trace_statistics import Floats

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Separation:
    """Two groups of numbers by layer; all arrays float64 (L,), NaN where a group has no spread.

    Attributes:
        effect: difference of means (first − second) in pooled standard deviations (Cohen's d).
        low: lower end of its 95 % interval, from the large-sample error of d (Hedges and Olkin 1985).
        high: upper end.
        auc: probability that one of the first lies above one of the second, ties counting half.
        first: how many numbers in the first group.
        second: how many in the second.
    """

    effect: Floats
    low: Floats
    high: Floats
    auc: Floats
    first: int
    second: int


def separate(first: Floats, second: Floats) -> Separation:
    """Separation of `first` `(n, L)` from `second` `(m, L)`, at least two numbers each.

    Raises:
        ValueError: a group has fewer than two.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise ValueError(f"a separation needs at least two numbers a group, not {n} and {m}")
    effect = measure_effect(first, second)
    error = np.sqrt((n + m) / (n * m) + effect**2 / (2 * (n + m)))
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    ranks = average_ranks(np.concatenate([first, second]))
    auc = (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)
    return Separation(effect, effect - reach, effect + reach, auc, n, m)


def measure_effect(first: Floats, second: Floats) -> Floats:
    """Difference of means in pooled standard deviations of `(…, n, L)` and `(…, m, L)`: `(…, L)`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = (first.mean(-2) - second.mean(-2)) / pooled_deviation(first, second)
    return np.where(np.isfinite(effect), effect, np.nan)


def pooled_deviation(first: Floats, second: Floats) -> Floats:
    """Root of the variance within `(…, n, L)` and `(…, m, L)`, with n + m − 2 degrees of freedom: `(…, L)`."""
    n, m = first.shape[-2], second.shape[-2]
    squares = first.var(-2) * n + second.var(-2) * m
    return np.asarray(np.sqrt(squares / (n + m - 2)), dtype=np.float64)


def standard_scores(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Both groups in pooled standard deviations from the mean of the second, for bands on one scale."""
    scale, zero = pooled_deviation(first, second), second.mean(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (first - zero) / scale, (second - zero) / scale


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1 down each column of `(n, L)`; equal values share the mean of their ranks."""
    ranks = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, which, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks[:, column] = (ends - (counts - 1) / 2)[which]
    return ranks
