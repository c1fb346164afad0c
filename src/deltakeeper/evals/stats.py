"""Statistics of paired experiments: proportions, flips, bootstrap over prompts or clusters, many tests at once.

A bootstrap resample is held as counts: how often each prompt was drawn. A weighted sum of a column of events is then
one matrix product, clusters of prompts need no ragged arrays, and all arms of a study share the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, false_discovery_control
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Takes counts `(resamples, n)` of how often each unit was drawn; gives one value a resample, `(resamples,)`."""

RESAMPLES = 10_000
LEVEL = 0.95
_FINITE_SHARE = 0.975
_CHUNK = 1_000_000
"""Entries drawn at a time, so that the drawing itself needs little memory beside its result."""


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or None with the reason in `note`; a note beside a number is a caution."""

    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    @property
    def estimable(self) -> bool:
        """Whether there is a number."""
        return self.value is not None


def not_estimable(reason: str) -> Estimate:
    """An estimate that is absent, with its reason."""
    return Estimate(None, None, None, f"not estimable: {reason}")


def wilson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion `k / n` (Wilson 1927).

    Raises:
        ValueError: `n` is not positive, or `k` is not within 0 and `n`.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"a proportion needs 0 <= k <= n and n >= 1, not k={k} of n={n}")
    low, high = proportion_confint(k, n, alpha=1 - level, method="wilson")
    # Rounding leaves 1e-18 where the bound is exactly zero or one.
    return Interval(0.0 if k == 0 else float(low), 1.0 if k == n else float(high))


def zero_hit_bound(n: int, level: float = LEVEL) -> float:
    """Upper bound of a proportion of which `n` trials showed nothing: `z² / (n + z²)`, the end of Wilson's interval."""
    return wilson(0, n, level).high


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p-value of `lost` against `gained` flips; 1 if nothing flipped."""
    return float(binomtest(min(lost, gained), lost + gained).pvalue) if lost + gained else 1.0


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


@lru_cache(maxsize=2)  # one for the attack's prompts and one for the skill's: a report asks for the same draws again
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


def percentile_estimate(observed: float, resampled: Floats, level: float = LEVEL) -> Estimate:
    """An observed value with the percentile interval of its resamples `(resamples,)`.

    Resamples that are not finite (a ratio whose denominator came out as zero) are left out while they are few; from one
    in forty on, the interval's ends would depend on them, and nothing is estimated.
    """
    finite = resampled[np.isfinite(resampled)]
    if not np.isfinite(observed) or len(finite) < _FINITE_SHARE * len(resampled):
        return not_estimable("the reference is zero in too many resamples")
    tail = (1 - level) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(float(observed), float(low), float(high))


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


def mcnemar_power(n: int, discordant: float, difference: float, *, level: float = LEVEL) -> float:
    """Chance that the exact McNemar test of `n` prompts is significant.

    Args:
        n: number of prompts.
        discordant: expected share of prompts that flip either way.
        difference: expected share that flips one way minus the share that flips the other way.
        level: one minus the significance level of the two-sided test.
    """
    flips = np.arange(n + 1)
    tail = (1 - level) / 2
    reached = np.asarray(binom.ppf(tail, flips, 0.5), dtype=np.float64)
    # The most events of the rarer kind that are still significant, -1 where none are.
    extreme = reached - (binom.cdf(reached, flips, 0.5) > tail)
    one_way = (discordant + difference) / (2 * discordant)
    rejected = binom.cdf(extreme, flips, one_way) + binom.cdf(extreme, flips, 1 - one_way)
    return float(binom.pmf(flips, n, discordant) @ rejected)


def minimum_detectable_effect(n: int, discordant: float, *, power: float = 0.8, level: float = LEVEL) -> float | None:
    """Smallest paired difference that the exact McNemar test of `n` prompts shows with the given power.

    Solved on the exact power: the usual normal formula `n = (z₁ √d + z₂ √(d − δ²))² / δ²` promises .8 and keeps .76 to
    .79 of it at the sizes met here.

    Args:
        n: number of prompts.
        discordant: expected share d of prompts that flip either way.
        power: chance of a significant result.
        level: one minus the significance level of the two-sided test.

    Returns:
        A difference δ within 0 and d; None if even flips all in one direction (δ = d) would not be shown.

    Raises:
        ValueError: `n` is not positive or `discordant` is not a share.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(f"needs n >= 1 and a share of flips within 0 and 1, not n={n} and {discordant}")
    if discordant == 0 or mcnemar_power(n, discordant, discordant, level=level) < power:
        return None
    return float(
        brentq(lambda delta: mcnemar_power(n, discordant, delta, level=level) - power, 0, discordant, xtol=1e-6)
    )


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

    The loss is shown to be at most m at the level if the bound is at most m.

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
    return paired_bootstrap(
        loss, len(reference), resamples=resamples, seed=seed, clusters=clusters, level=two_sided
    ).high


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """P-values adjusted for the false discovery rate (Benjamini and Hochberg 1995), in the given order."""
    return [float(q) for q in false_discovery_control(list(p))] if p else []
