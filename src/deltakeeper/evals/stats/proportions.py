"""Proportions: Wilson's interval and what no hit at all still allows."""

from __future__ import annotations

from statsmodels.stats.proportion import proportion_confint

from deltakeeper.evals.stats.estimates import LEVEL, Interval


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
