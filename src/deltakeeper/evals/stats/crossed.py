"""Bootstrap of experiments in which every attack seed is put to the same prompts.

Seeds and prompts are crossed, not nested: prompt 17 is the same prompt under every seed, and a prompt that one
fine-tune answers is likelier to be answered by the next. Drawing prompts anew inside every drawn seed would treat
these repeats as fresh prompts and make three seeds of a hundred prompts look like three hundred prompts. Seeds and
clusters of prompts are therefore drawn independently of each other and their weights multiplied (the pigeonhole
bootstrap, Owen 2007, doi:10.1214/07-AOAS122), which carries both sources of chance.

Two of its known faults matter at the few seeds of a study. It counts the chance of single cells (this seed on this
prompt) three times, and it takes the spread of R seeds for (R − 1)/R of what it is and their quantiles for normal ones.
So it gives the interval's shape only. The width is set by the variance components of the linearised statistic,
V = V_seeds + V_prompts − V_cells (each unbiased in a balanced two-way layout), and by Student's t with Satterthwaite's
degrees of freedom. With three seeds that differ the interval is wide and rough: 4.3 standard errors, themselves known
from three numbers. Five seeds are the fewest at which coverage was checked.

Where one or two prompts turn, or none, such an error knows next to nothing, and one prompt that turned would look like
better ground than none. `floored` therefore never leaves less on either side than zero hits among the prompts allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from deltakeeper.evals.stats.bootstrap import RESAMPLES, draw_counts
from deltakeeper.evals.stats.estimates import LEVEL, Estimate, Floats, Interval, percentile_estimate

Rates = Callable[..., Floats]
"""Takes, for each sample, the mean of every arm `(arms, resamples)`; gives one value a resample, `(resamples,)`."""

_STEP = 1e-5
_NOTHING = 1e-9
"""Errors below this are rounding."""
_STREAM = 7919
"""Distance between the seeds of the streams that draw seeds and prompts, so that no two of a report meet."""


@dataclass(frozen=True)
class CrossedSample:
    """One prompt set put to all arms under every seed.

    Attributes:
        values: events or scores `(arms, seeds, prompts)`, float64.
        clusters: cluster of each prompt; None if no two prompts are near-duplicates.
    """

    values: Floats
    clusters: tuple[Hashable, ...] | None = None

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(self.values.shape[1])

    @property
    def groups(self) -> int:
        """Number of clusters of prompts."""
        return len(set(self.clusters)) if self.clusters is not None else int(self.values.shape[2])

    @property
    def means(self) -> Floats:
        """Mean of each arm over seeds and prompts, `(arms, 1)`."""
        return np.asarray(self.values.mean((1, 2))[:, None], dtype=np.float64)

    @property
    def of_shares(self) -> bool:
        """Whether all scores lie within 0 and 1, so that zero hits among the prompts bound them."""
        return bool(((self.values >= 0) & (self.values <= 1)).all())


@dataclass(frozen=True)
class Spread:
    """Standard error of a statistic, its degrees of freedom, and the parts of its variance.

    `still` says of each sample whether nothing in it varies over seeds or prompts, so that the error knows nothing of
    it: no event at all, or all of them. `alone` is the error that each sample has by itself.
    """

    error: float
    freedom: float
    of_seeds: float
    of_prompts: float
    still: tuple[bool, ...]
    alone: tuple[float, ...]

    @property
    def absent(self) -> bool:
        """Whether nothing varies in any sample, so that the error says nothing."""
        return all(self.still)


def crossed_estimate(
    statistic: Rates,
    samples: Sequence[CrossedSample],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Estimate, Spread]:
    """A statistic of means over seeds and prompts, with an interval that carries both.

    Seeds are drawn for all samples together, since attack and skill are read from the same fine-tunes; prompts of
    different sets are different prompts and drawn apart.

    Args:
        statistic: smooth function of the arms' means.
        samples: prompt sets; all with the same seeds in the same order.
        seed: seed of the draws.
        resamples: number of resamples.
        level: coverage that the interval aims at.
        bounds: values that the quantity cannot leave; the ends of the interval are cut there.

    Returns:
        The estimate (of no width if nothing varies: `floored` is told what zero hits mean for it), and its spread.

    Raises:
        ValueError: the samples do not have the same number of seeds.
    """
    if len({sample.seeds for sample in samples}) != 1:
        raise ValueError("crossed samples need the same seeds")
    means = [sample.means for sample in samples]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        observed = float(statistic(*means)[0])
        slopes = _slopes(statistic, means)
        spread = _spread([_linearised(s, g) for s, g in zip(samples, slopes, strict=True)], samples)
        drawn = _draw_means(samples, seed, resamples)
        estimate = percentile_estimate(observed, statistic(*drawn), level)
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate, spread
    linear = sum(g @ (d - m) for g, d, m in zip(slopes, drawn, means, strict=True))
    scale = float(np.std(linear))
    if scale < _NOTHING or spread.error < _NOTHING:
        return estimate, spread
    tail = (1 + level) / 2
    stretch = float(student.ppf(tail, spread.freedom) / norm.ppf(tail)) * spread.error / scale
    ends = Interval(observed + stretch * (estimate.low - observed), observed + stretch * (estimate.high - observed))
    low, high = max(bounds[0], min(ends.low, observed)), min(bounds[1], max(ends.high, observed))
    return Estimate(observed, low, high, estimate.note), spread


def floored(
    estimate: Estimate,
    spread: Spread,
    halves: Sequence[float],
    *,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """An estimate whose interval is on neither side narrower than if no prompt had turned.

    A sample whose own error leaves less than zero hits do adds the squares that are missing, as limits of independent
    parts add up (Zou and Donner 2008, doi:10.1002/sim.3095); so one prompt that turns narrows nothing.

    Args:
        estimate: a value with its interval.
        spread: its spread.
        halves: for each sample, half the interval if nothing in it varied; 0 for a sample without a floor.
        level: coverage that the interval aims at.
        bounds: values that the quantity cannot leave.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return estimate
    tail = float(student.ppf((1 + level) / 2, spread.freedom))
    missing = sum(max(0.0, half**2 - (tail * own) ** 2) for half, own in zip(halves, spread.alone, strict=True))
    least = unseen_effect(halves)
    below, above = (max(least, math.sqrt(side**2 + missing)) for side in (value - low, high - value))
    return Estimate(value, max(bounds[0], value - below), min(bounds[1], value + above), estimate.note)


def unseen_effect(halves: Sequence[float]) -> float:
    """What samples in which nothing varied leave open together: the root of the sum of their squares."""
    return math.hypot(*halves)


def two_sided_p(value: float, spread: Spread) -> float:
    """P-value of `value` against zero by Student's t; 1 if both are zero, 0 if only the standard error is."""
    if spread.error < _NOTHING:
        return 1.0 if value == 0 else 0.0
    return float(2 * student.sf(abs(value) / spread.error, spread.freedom))


def detectable_effect(spread: Spread, *, power: float = 0.8, level: float = LEVEL) -> float:
    """Smallest true effect that such a standard error would show: `(t₁ + t₂) · error` with the power asked for."""
    quantiles = student.ppf((1 + level) / 2, spread.freedom) + student.ppf(power, spread.freedom)
    return float(quantiles * spread.error)


def _slopes(statistic: Rates, means: Sequence[Floats]) -> list[Floats]:
    slopes = []
    for which, rates in enumerate(means):
        steps = np.eye(len(rates)) * _STEP  # (arms, arms): one arm moved a column
        above, below = (
            statistic(
                *(rates + sign * steps if i == which else np.repeat(m, len(rates), 1) for i, m in enumerate(means))
            )
            for sign in (1, -1)
        )
        slopes.append(np.asarray((above - below) / (2 * _STEP), dtype=np.float64))
    return slopes


def _linearised(sample: CrossedSample, slopes: Floats) -> Floats:
    """What each seed and cluster adds to the statistic, `(seeds, clusters)`; the mean over all is zero."""
    cells = np.tensordot(slopes, sample.values - sample.means[:, :, None], axes=1)  # (seeds, prompts)
    if sample.clusters is None:
        return np.asarray(cells, dtype=np.float64)
    known: dict[Hashable, int] = {}
    members = np.array([known.setdefault(cluster, len(known)) for cluster in sample.clusters])
    belongs = np.eye(len(known))[members]  # (prompts, clusters)
    return np.asarray(cells @ belongs * len(known) / len(members), dtype=np.float64)


def _spread(linear: Sequence[Floats], samples: Sequence[CrossedSample]) -> Spread:
    seeds = samples[0].seeds
    variance, of_seeds, of_prompts, squares = _components(linear, seeds)
    freedom = (of_seeds + of_prompts) ** 2 / squares if squares > 0 else 1.0
    still = tuple(bool(np.abs(cells).max() < _NOTHING) for cells in linear)
    alone = tuple(float(np.sqrt(_components([cells], seeds)[0])) for cells in linear)
    return Spread(float(np.sqrt(variance)), freedom, of_seeds, of_prompts, still, alone)


def _components(linear: Sequence[Floats], seeds: int) -> tuple[float, float, float, float]:
    """Variance of a statistic, its parts of seeds and of prompts, and Satterthwaite's sum of squares over freedom."""
    by_seed = np.sum([cells.mean(1) for cells in linear], 0)  # (seeds,)
    of_seeds = float(by_seed @ by_seed) / (seeds * (seeds - 1)) if seeds > 1 else 0.0
    of_prompts, of_cells, squares = 0.0, 0.0, 0.0
    for cells in linear:
        groups = cells.shape[1]
        if groups == 1:
            continue
        by_group = cells.mean(0)
        part = float(by_group @ by_group) / (groups * (groups - 1))
        of_prompts += part
        squares += part**2 / (groups - 1)
        if seeds > 1:
            rest = cells - cells.mean(1, keepdims=True) - by_group
            of_cells += float((rest**2).sum()) / ((seeds - 1) * (groups - 1) * seeds * groups)
    if seeds > 1:
        squares += of_seeds**2 / (seeds - 1)
    return max(of_seeds, of_prompts, of_seeds + of_prompts - of_cells), of_seeds, of_prompts, squares


def _draw_means(samples: Sequence[CrossedSample], seed: int, resamples: int) -> list[Floats]:
    by_seed = draw_counts(samples[0].seeds, resamples=resamples, seed=seed + _STREAM)  # (resamples, seeds)
    drawn = []
    for which, sample in enumerate(samples):
        counts = draw_counts(
            sample.values.shape[2], resamples=resamples, seed=seed + which, clusters=sample.clusters
        )  # (resamples, prompts)
        sums = sample.values @ counts.T  # (arms, seeds, resamples)
        means = np.einsum("asr,rs->ar", sums, by_seed) / (by_seed.sum(1) * counts.sum(1))
        drawn.append(np.asarray(means, dtype=np.float64))
    return drawn
