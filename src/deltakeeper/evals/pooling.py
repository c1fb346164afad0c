"""Estimates over several attack seeds: pooled, of each seed alone, and what is said where little or nothing varied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.evals.comparison import Clusters, pair
from deltakeeper.evals.stats import (
    LEVEL,
    CrossedSample,
    Estimate,
    Floats,
    crossed_estimate,
    detectable_effect,
    floored,
    mcnemar_exact,
    not_estimable,
    two_sided_p,
    unseen_effect,
)

Scores = Mapping[str, float]
"""Event (False or True) or score of each prompt, by prompt id."""
Runs = Mapping[int, Scores]
"""Scores of one arm by attack seed."""

FEW_SEEDS = 5
"""Below this many seeds the coverage of an interval was not checked, and a note says so."""

Rule = Callable[[CrossedSample], str]
"""Why a sample lets nothing be estimated, or an empty text."""
Half = Callable[[CrossedSample], float]
"""Half the width of the interval of a sample in which nothing varied, and the least of one in which little did."""


@dataclass(frozen=True)
class Replicated:
    """An estimate over seeds and prompts, and the same of each seed alone (over prompts only).

    `p` is two-sided against zero, `detectable` the smallest true value that would have been shown with power .8; both
    are None where nothing is estimable.
    """

    pooled: Estimate
    by_seed: Mapping[int, Estimate]
    prompts: int
    clusters: int
    p: float | None
    detectable: float | None

    @property
    def value(self) -> float | None:
        """The pooled value."""
        return self.pooled.value

    @property
    def low(self) -> float | None:
        """Lower end of the pooled interval."""
        return self.pooled.low

    @property
    def high(self) -> float | None:
        """Upper end of the pooled interval."""
        return self.pooled.high

    @property
    def note(self) -> str:
        """Why there is no value, or a caution beside it."""
        return self.pooled.note

    @property
    def estimable(self) -> bool:
        """Whether there is a pooled value."""
        return self.pooled.estimable

    def to_json(self) -> dict[str, Any]:
        """Plain values; seeds become texts, as keys of JSON are."""
        return asdict(self) | {"by_seed": {str(seed): asdict(one) for seed, one in self.by_seed.items()}}


class Pooling:
    """Samples with their seeds, estimated together and seed by seed."""

    def __init__(self, samples: Sequence[CrossedSample], seeds: Sequence[int], seed: int, resamples: int) -> None:
        self.samples, self.seeds, self.seed, self.resamples = list(samples), list(seeds), seed, resamples

    def estimate(
        self,
        statistic: Callable[..., Floats],
        *,
        fault: Rule | None = None,
        bounds: tuple[float, float] = (-np.inf, np.inf),
        half: Half,
        floor: bool = True,
    ) -> Replicated:
        """The statistic over all seeds and of each."""
        whole = self.pooled(statistic, fault=fault, bounds=bounds, half=half, floor=floor)
        alone = {
            seed: Pooling(
                [CrossedSample(sample.values[:, [i]], sample.clusters) for sample in self.samples],
                [seed],
                self.seed,
                self.resamples,
            )
            .pooled(statistic, fault=fault, bounds=bounds, half=half, floor=floor, caution=False)
            .pooled
            for i, seed in enumerate(self.seeds)
        }
        return Replicated(whole.pooled, alone, whole.prompts, whole.clusters, whole.p, whole.detectable)

    def pooled(
        self,
        statistic: Callable[..., Floats],
        *,
        fault: Rule | None = None,
        bounds: tuple[float, float] = (-np.inf, np.inf),
        half: Half,
        floor: bool = True,
        level: float = LEVEL,
        caution: bool = True,
    ) -> Replicated:
        """The statistic over all seeds together.

        Args:
            statistic: of the arms' means in each sample.
            fault: why a sample lets nothing be estimated.
            bounds: values that the quantity cannot leave.
            half: half the interval of a sample in which nothing varied.
            floor: whether a sample of scores within 0 and 1 in which little varied gets no less than that either.
            level: coverage that the interval aims at.
            caution: whether the note says that there are few seeds.
        """
        prompts = sum(sample.values.shape[2] for sample in self.samples)
        clusters = sum(sample.groups for sample in self.samples)
        faults = [text for sample in self.samples if fault and (text := fault(sample))]
        if faults:
            return Replicated(not_estimable("; ".join(faults)), {}, prompts, clusters, None, None)
        estimate, spread = crossed_estimate(
            statistic, self.samples, seed=self.seed, resamples=self.resamples, level=level, bounds=bounds
        )
        value = estimate.value
        if value is None:
            return Replicated(estimate, {}, prompts, clusters, None, None)
        notes = [note] if caution and (note := _caution(len(self.seeds))) else []
        if any(spread.still):
            notes.append("nothing varied: bounded as zero hits are")
        # No width, or that of one prompt that turned, would claim to know that no other can turn out otherwise.
        halves = [
            half(sample) if still or (floor and sample.of_shares) else 0.0
            for sample, still in zip(self.samples, spread.still, strict=True)
        ]
        wide = floored(estimate, spread, halves, level=level, bounds=bounds)
        estimate = Estimate(value, wide.low, wide.high, "; ".join(notes))
        if spread.absent:
            p = mcnemar_exact(min(sample.groups for sample in self.samples), 0) if value else 1.0
            return Replicated(estimate, {}, prompts, clusters, p, unseen_effect(halves))
        shown = max(detectable_effect(spread, level=level), unseen_effect(halves))
        return Replicated(estimate, {}, prompts, clusters, two_sided_p(value, spread), shown)


def _caution(seeds: int) -> str:
    if seeds == 1:
        return "one seed: the interval knows of prompts only"
    return f"{seeds} seeds: the interval is rough" if seeds < FEW_SEEDS else ""


def crossed_sample(runs: Sequence[Runs], clusters: Clusters | None) -> CrossedSample:
    """Scores of several arms `(arms, seeds, prompts)`, paired by seed and prompt id.

    Raises:
        DataError: the arms have other seeds or other prompts, there are none, or a prompt has no cluster.
    """
    seeds = sorted(runs[0])
    if not seeds:
        raise DataError("a comparison over seeds has no seeds; give every arm at least one.")
    for arm in runs[1:]:
        if odd := sorted(arm.keys() ^ set(seeds)):
            raise DataError(f"seed {odd[0]} was not run in all arms; compare arms of the same seeds.")
    ids, columns = pair([arm[seed] for arm in runs for seed in seeds])
    if clusters is not None and (odd_ids := [id for id in ids if id not in clusters]):
        raise DataError(f"prompt {odd_ids[0]!r} has no cluster; give every prompt one or pass no clusters.")
    values = np.array(columns, dtype=np.float64).reshape(len(runs), len(seeds), len(ids))
    names: tuple[Hashable, ...] | None = None if clusters is None else tuple(clusters[id] for id in ids)
    return CrossedSample(values, names)
