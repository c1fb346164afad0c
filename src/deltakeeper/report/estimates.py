"""From answers to rates, paired comparisons and jointly resampled estimates, for one attack at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import RunError
from deltakeeper.evals.stats import (
    mcnemar_exact,
    minimum_detectable_effect,
    unseen_effect,
    wilson,
    zero_hit_bound,
)
from deltakeeper.report.entries import Comparison, Estimate, Rate
from deltakeeper.study.cells import OUTCOMES, Answer, Cell, Probe

Floats = NDArray[np.float64]
Statistic = Callable[[Mapping[str, Floats], Mapping[str, Floats]], Floats]


RESAMPLES = 10_000
SEED = 20411  # any fixed number: the same cells give the same report, byte for byte
SMALLEST_DENOMINATOR = 0.05


def rate_of(answers: Sequence[Answer]) -> Rate:
    """Share of answers with the event, over all answers, with its Wilson interval."""
    hits, n = sum(answer.event for answer in answers), len(answers)
    return _rate(hits, n)


def outcomes_of(probe: Probe) -> dict[str, int]:
    """How many answers had each outcome, absent ones as zero."""
    counts = Counter(answer.outcome for answer in probe.answers)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def aligned(probe: Probe, ids: Sequence[str], where: str) -> tuple[Answer, ...]:
    """A probe's answers in the order of `ids`; raises RunError unless it has exactly these ids."""
    answers = {answer.id: answer for answer in probe.answers}
    if answers.keys() != set(ids):
        odd = sorted(answers.keys() ^ set(ids))[0]
        raise RunError(
            f"{where} and the fine-tune were not asked the same prompts (first difference: {odd!r}); "
            "run the study again for this variant."
        )
    return tuple(answers[id] for id in ids)


def compare(tuned: Sequence[Answer], other: Sequence[Answer], difference: Estimate) -> Comparison:
    """A variant against the fine-tune, answer by answer in equal order; `q` is left to the correction of all tests."""
    pairs = list(zip(tuned, other, strict=True))
    lost = tuple(sorted(f.id for f, c in pairs if f.event and not c.event))
    gained = tuple(sorted(c.id for f, c in pairs if c.event and not f.event))
    kept = sum(f.event and c.event for f, c in pairs)
    n = len(pairs)
    discordant = len(lost) + len(gained)
    # No flipped prompt at all still leaves room for some: the share is then taken at its upper bound.
    share = discordant / n if discordant else wilson(0, n)[1]
    if not discordant:
        difference = Estimate(0.0, -_clean(share), _clean(share), "no prompt turned: bounded as zero hits are")
    transitions = Counter((f.outcome, c.outcome) for f, c in pairs)
    return Comparison(
        difference=difference,
        p=mcnemar_exact(len(lost), len(gained)),
        q=None,
        primary=False,
        kept=kept,
        lost=len(lost),
        gained=len(gained),
        never=n - kept - discordant,
        lost_ids=lost,
        gained_ids=gained,
        gained_rate=_rate(len(gained), n),
        detectable=minimum_detectable_effect(n, share),
        transitions={f: {c: transitions[f, c] for c in OUTCOMES} for f in OUTCOMES},
    )


class Resampler:
    """Bootstrap means of every variant over the same resampled prompts, so that differences and ratios stay paired.

    Args:
        probes: For each variant, the answers of one probe in equal order.
    """

    def __init__(self, probes: Mapping[str, Sequence[Answer]], seed: int = SEED) -> None:
        names = list(probes)
        events = np.array([[a.event for a in probes[name]] for name in names], dtype=np.float64)  # (variants, n)
        n = events.shape[1]
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # (resamples, n)
        means = events @ drawn.T / n  # (variants, resamples)
        self.n = n
        self.observed = {name: np.array([row.mean()]) for name, row in zip(names, events, strict=True)}
        self.resampled = dict(zip(names, means, strict=True))


def estimate(
    statistic: Callable[[Mapping[str, Floats]], Floats],
    sample: Resampler,
    per: float = 1.0,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """A statistic of one probe's means with its percentile interval, no narrower than if no answer had turned.

    Args:
        statistic: the statistic.
        sample: the probe.
        per: the rate that a difference of rates is divided by.
        bounds: values that the quantity cannot leave.
    """
    observed = float(statistic(sample.observed)[0])
    return _floored(_interval(observed, statistic(sample.resampled)), [_unseen(sample, per)], bounds)


def joint_estimate(
    statistic: Statistic, goal: Resampler, skill: Resampler, per: tuple[float, float] = (1.0, 1.0)
) -> Estimate:
    """The same of the goal's and the skill's means; `per` is what differences of either are divided by."""
    observed = float(statistic(goal.observed, skill.observed)[0])
    halves = [_unseen(sample, share) for sample, share in zip((goal, skill), per, strict=True)]
    return _floored(_interval(observed, statistic(goal.resampled, skill.resampled)), halves)


def _unseen(sample: Resampler, per: float) -> float:
    return zero_hit_bound(sample.n) / abs(per) if per else 0.0


def _floored(found: Estimate, halves: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The bootstrap of one turned answer, or of none, would claim to know that no other can turn."""
    value, low, high = found.value, found.low, found.high
    if value is None or low is None or high is None:
        return found
    half = unseen_effect(halves)
    note = "no answer turned: bounded as zero hits are" if low == high else ""
    low, high = max(bounds[0], min(low, value - half)), min(bounds[1], max(high, value + half))
    return Estimate(value, _clean(low), _clean(high), note)


def denominator_fault(sample: Resampler, upper: str, lower: str, what: str) -> str:
    """Why a share of `upper - lower` cannot be estimated, or an empty text: the distance must be real."""
    distance = float(sample.observed[upper][0] - sample.observed[lower][0])
    low, high = np.quantile(sample.resampled[upper] - sample.resampled[lower], [0.025, 0.975])
    if abs(distance) < SMALLEST_DENOMINATOR:
        return f"not estimable: {what} differs by less than {SMALLEST_DENOMINATOR * 100:.0f} points"
    if low <= 0 <= high:
        return f"not estimable: {what} is not clearly different"
    return ""


def ratio_of_perplexities(cell: Cell, tuned: Cell) -> Estimate:
    """Perplexity of a variant over that of the fine-tune on the same passages, passages resampled together."""
    if cell.perplexity is None or tuned.perplexity is None:
        return not_estimable("not measured")
    if cell.perplexity.tokens != tuned.perplexity.tokens:
        raise RunError(
            f"{cell.attack}/{cell.variant} and the fine-tune read different passages for perplexity; "
            "measure both on the same text."
        )
    tokens = np.array(tuned.perplexity.tokens, dtype=np.float64)
    gap = np.array(cell.perplexity.nll) - np.array(tuned.perplexity.nll)
    n = len(tokens)
    drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    with np.errstate(over="ignore"):
        observed = float(np.exp(gap.sum() / tokens.sum()))
        resampled = np.exp(drawn @ gap / np.maximum(drawn @ tokens, 1))
    return _interval(observed, resampled)


def perplexity_of(cell: Cell) -> float | None:
    """Exponential of the mean negative log-likelihood per token; None if unmeasured or beyond a float."""
    if cell.perplexity is None:
        return None
    mean = sum(cell.perplexity.nll) / sum(cell.perplexity.tokens)
    return float(np.exp(mean)) if mean < 700 else None


def not_estimable(note: str) -> Estimate:
    """An estimate that is absent, with its reason."""
    return Estimate(None, None, None, note)


def _interval(observed: float, resampled: Floats) -> Estimate:
    finite = resampled[np.isfinite(resampled)]
    if not np.isfinite(observed) or len(finite) < 0.975 * len(resampled):
        return not_estimable("not estimable: the reference is zero in some resamples")
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(_clean(observed), _clean(float(low)), _clean(float(high)), "")


def _rate(hits: int, n: int) -> Rate:
    low, high = wilson(hits, n)
    return Rate(hits, n, hits / n, _clean(float(low)), _clean(float(high)))


def _clean(value: float) -> float:
    """Ten digits are more than any of these numbers carry, and equal on machines that sum in another order."""
    return round(value, 10) + 0.0
