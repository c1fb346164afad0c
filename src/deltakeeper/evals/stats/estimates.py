"""A number with its interval, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
_FINITE_SHARE = 0.975


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


def no_narrower(estimate: Estimate, half: float, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """An estimate whose interval reaches at least `half` on either side, and nowhere beyond `bounds`.

    A bootstrap sees only prompts that turned, so with one or two of them it is narrower than what none leaves open.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return estimate
    low, high = max(bounds[0], min(low, value - half)), min(bounds[1], max(high, value + half))
    return Estimate(value, low, high, estimate.note)


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
