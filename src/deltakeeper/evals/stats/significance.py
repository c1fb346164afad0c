"""Tests of paired experiments, what they could have shown, and many of them at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, false_discovery_control

from deltakeeper.evals.stats.bootstrap import RESAMPLES
from deltakeeper.evals.stats.estimates import LEVEL, Floats

_EXACT = 14
"""Up to this many groups that differ, all 2^k signs are tried."""
_CHUNK = 1_000_000


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p-value of `lost` against `gained` flips; 1 if nothing flipped."""
    return float(binomtest(min(lost, gained), lost + gained).pvalue) if lost + gained else 1.0


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


@lru_cache(maxsize=4096)  # a report asks for the same fine-tune and base again for every arm
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


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """P-values adjusted for the false discovery rate (Benjamini and Hochberg 1995), in the given order."""
    return [float(q) for q in false_discovery_control(list(p))] if p else []


def paired_permutation(
    one: Floats,
    other: Floats,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided permutation p-value of a mean paired difference: within a group the two arms may be exchanged.

    Exact while no more than 14 groups differ; beyond that by random exchanges, counting the observed one as one of
    them, so that the value is never zero.

    Args:
        one: scores `(n,)` of one arm.
        other: scores `(n,)` of the other arm on the same prompts.
        clusters: group of each prompt, exchanged as a whole; each prompt by itself if not given.
        resamples: number of random exchanges.
        seed: seed of the random exchanges.

    Raises:
        ValueError: the arms or the clusters differ in length.
    """
    gaps = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if clusters is not None:
        if len(clusters) != len(gaps):
            raise ValueError(f"there are {len(clusters)} cluster names for {len(gaps)} prompts")
        sums: dict[Hashable, float] = {}
        for cluster, gap in zip(clusters, gaps.tolist(), strict=True):
            sums[cluster] = sums.get(cluster, 0.0) + gap
        gaps = np.array(list(sums.values()))
    gaps = gaps[np.abs(gaps) > 1e-12]
    reached = abs(float(gaps.sum())) - 1e-9
    k = len(gaps)
    if k <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)  # (2^k, k)
        return float(np.mean(np.abs(signs @ gaps) >= reached))
    rng = np.random.default_rng(seed)
    extreme, step = 0, max(1, _CHUNK // k)
    for start in range(0, resamples, step):
        flips = rng.integers(2, size=(min(step, resamples - start), k))
        extreme += int(np.sum(np.abs((1 - 2 * flips) @ gaps) >= reached))
    return (extreme + 1) / (resamples + 1)
