"""The gap in risk between two arms: its interval, its test, and how much more evidence would show it."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from deltakeeper.advice.evidence import Evidence, goal_runs
from deltakeeper.advice.records import Arm, Gap
from deltakeeper.errors import RunError
from deltakeeper.evals.pooling import crossed_sample
from deltakeeper.evals.replicates import sign_test
from deltakeeper.evals.stats import (
    Floats,
    Spread,
    crossed_estimate,
    detectable_effect,
    floored,
    mcnemar_exact,
    two_sided_p,
    unseen_effect,
    zero_hit_bound,
)
from deltakeeper.study.groups import Group
from deltakeeper.study.summarising import RESAMPLES, SEED
from deltakeeper.study.summary import Number

POWER = 0.8
MOST_SEEDS = 100
MOST_PROMPTS = 1_000
"""Numbers beyond these are no advice: every seed is a fine-tune, and prompts are written one by one."""
SMALLEST = 0.005
"""A gap below half a point is none to look for."""


def gap_between(evidence: Evidence, best: Arm, other: Arm, compared: int) -> Gap:
    """Risk of `other` minus risk of `best`, each where it is worst.

    Where both are worst against the same attack, answers are paired by seed and prompt and the base drops out; the
    p-value is then at least that of an exact sign test over prompts, since few flips are no ground for a t-test. The
    interval is no narrower than if no prompt had turned.

    Args:
        evidence: the attacks that count.
        best: the arm of the lower risk.
        other: the arm that it is compared with.
        compared: how many arms the best is compared with; sets how small a p-value would tell.

    Raises:
        RunError: the two arms share no seed.
    """
    here, there = (evidence.group(arm.worst) for arm in (best, other) if arm.worst is not None)
    seeds = _shared(here, there, best.variant, other.variant)
    mine, theirs = goal_runs(here, best.variant, seeds), goal_runs(there, other.variant, seeds)
    if here is there:
        samples = [crossed_sample([mine, theirs], here.clusters[here.name_of("goal")])]

        def statistic(*rates: Floats) -> Floats:
            return np.asarray(rates[0][1] - rates[0][0])
    else:
        samples = [
            crossed_sample([goal_runs(group, group.base, seeds), runs], group.clusters[group.name_of("goal")])
            for group, runs in ((here, mine), (there, theirs))
        ]

        def statistic(*rates: Floats) -> Floats:
            return np.asarray((rates[1][1] - rates[1][0]) - (rates[0][1] - rates[0][0]))

    estimate, spread = crossed_estimate(statistic, samples, seed=SEED, resamples=RESAMPLES)
    prompts = min(sample.groups for sample in samples)
    halves = [zero_hit_bound(sample.groups) for sample in samples]
    value = estimate.value or 0.0
    # Risks are read over the base, so two that differ by more than all prompts are two attacks with unlike bases.
    most = max(1.0, abs(value))
    found = floored(estimate, spread, halves, bounds=(-most, most))
    low, high = found.low or 0.0, found.high or 0.0
    p = two_sided_p(value, spread)
    if here is there:
        p = max(p, sign_test(theirs, mine))
    elif spread.absent and value:
        p = mcnemar_exact(prompts, 0)
    seeds_needed, prompts_needed, both = _needed(value, spread, len(seeds), prompts, compared)
    return Gap(
        best=best.variant,
        other=other.variant,
        difference=Number(value=round(value, 5), low=round(low, 5), high=round(high, 5)),
        p=p,
        q=p,
        seeds=len(seeds),
        prompts=prompts,
        detectable=round(max(detectable_effect(spread), unseen_effect(halves)), 5),
        more_seeds=seeds_needed,
        more_prompts=prompts_needed,
        more_both=both,
    )


def _shared(here: Group, there: Group, best: str, other: str) -> tuple[int, ...]:
    first, second = set(here.shared_seeds(best)), set(there.shared_seeds(other))
    if not first & second:
        raise RunError(f"{best} and {other} were run with no seed in common; finish the study for both.")
    return tuple(sorted(first & second))


def _needed(
    value: float, spread: Spread, seeds: int, prompts: int, compared: int
) -> tuple[int | None, int | None, tuple[int, int] | None]:
    """Seeds, prompts, or both that would show a gap of this size, from the parts of its variance.

    The variance that shows a gap δ with power .8 is (δ / (z₁ + z₂))², z₁ at the 5 % level over the number of arms
    compared (Bonferroni, a bound for what Benjamini-Hochberg asks). Seeds lower their own part, prompts theirs.
    """
    if abs(value) < SMALLEST or spread.absent:
        return None, None, None
    wanted = (value / float(norm.ppf(1 - 0.025 / max(compared, 1)) + norm.ppf(POWER))) ** 2
    of_seeds, of_prompts = spread.of_seeds, spread.of_prompts
    by_prompts = _scaled(prompts, of_prompts, wanted - of_seeds, MOST_PROMPTS)
    by_seeds = _scaled(seeds, of_seeds, wanted - of_prompts, MOST_SEEDS) if seeds > 1 else None
    if by_prompts is not None or by_seeds is not None:
        return by_seeds, by_prompts, None
    factor = (of_seeds + of_prompts) / wanted
    both = (math.ceil(seeds * factor), math.ceil(prompts * factor))
    return None, None, both if both[0] <= MOST_SEEDS and both[1] <= MOST_PROMPTS else None


def _scaled(count: int, part: float, room: float, most: int) -> int | None:
    """How many of a thing bring its part of the variance down to what room there is; never fewer than there are."""
    if room <= 0 or part <= 0:
        return None
    needed = math.ceil(count * part / room)
    return max(needed, count + 1) if needed <= most else None
