"""Whether variants that keep more of the fine-tuning also behave more like it: a rank correlation over few points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from statistics import NormalDist

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.separation import LEVEL, average_ranks
from deltakeeper.lens.trace_statistics import Floats

_FEWEST = 4
_EXACT = 8
_DRAWS = 20_000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over variants.

    Attributes:
        value: from −1 to 1; None where one side is constant or there are fewer than three points.
        low: lower end of the 95 % interval (Bonett and Wright 2000); None below four points.
        high: upper end.
        p: two-sided share of reorderings that come as far; exact up to eight points.
        points: name, kept share and rate of every variant that has both.
        note: how few points there are and what they are not; always printed beside the number.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    points: tuple[tuple[str, float, float], ...]
    note: str


def correlate(kept: Mapping[str, float], rates: Mapping[str, float], *, seed: int = 0) -> Correlation:
    """Correlation across variants between a kept share in the lens and a rate of behaviour.

    Args:
        kept: share by variant, for instance the ratio of sums of one layer; NaN where there is none.
        rates: attack success or refusal rate by variant.
        seed: of random reorderings, beyond eight points.

    Raises:
        DataError: no variant has both.
    """
    points = tuple(
        (name, float(kept[name]), float(rates[name]))
        for name in kept
        if name in rates and math.isfinite(kept[name]) and math.isfinite(rates[name])
    )
    if not points:
        raise DataError("no variant has both a kept share and a rate; name variants alike in both.")
    n = len(points)
    note = f"{n} variants; levels of one codec are not independent, and a correlation over variants is not a mechanism"
    ranks = average_ranks(np.array([point[1:] for point in points]))
    ranks -= ranks.mean(0)
    scale = math.sqrt(float((ranks[:, 0] ** 2).sum() * (ranks[:, 1] ** 2).sum()))
    if n < 3 or scale == 0:
        why = "too few for a correlation" if n < 3 else "one side does not vary"
        return Correlation(None, None, None, None, points, f"not estimable, {why}: {note}")
    value = max(-1.0, min(1.0, float(ranks[:, 0] @ ranks[:, 1]) / scale))
    shuffled = np.abs(ranks[:, 0] @ _reorderings(ranks[:, 1], seed)) / scale
    p = float((shuffled >= abs(value) - 1e-9).mean())
    if n < _FEWEST:
        return Correlation(value, None, None, p, points, f"no interval below {_FEWEST} points: {note}")
    low, high = _interval(value, n)
    return Correlation(value, low, high, p, points, note)


def rank_correlations(one: Floats, other: Floats) -> Floats:
    """Spearman's rank correlation of each row of two arrays (rows, points), (rows,); NaN where one does not vary."""
    ranks = [average_ranks(values.T).T for values in (one, other)]
    first, second = (each - each.mean(1, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.where(np.isfinite(one).all(1) & np.isfinite(other).all(1), found, np.nan)


def _interval(value: float, n: int) -> tuple[float, float]:
    """Fisher's z with Bonett and Wright's error; a perfect order counts as half a swap of neighbours away from it."""
    most = 1 - 6 / (n**3 - n)
    middle = math.atanh(max(-most, min(most, value)))
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt((1 + value**2 / 2) / (n - 3))
    ends = math.tanh(middle - reach), math.tanh(middle + reach)
    return min(ends[0], value), max(ends[1], value)


def _reorderings(ranks: Floats, seed: int) -> Floats:
    """Orders of ranks (n,) as columns (n, draws), the given one among them: all of few, or random ones of many."""
    if len(ranks) <= _EXACT:
        return np.array(list(permutations(ranks.tolist()))).T
    drawn = np.random.default_rng(seed).permuted(np.tile(ranks, (_DRAWS, 1)), axis=1)
    return np.concatenate([ranks[None], drawn]).T
