"""Where a fine-tune leaves its base, and from where a compressed one is back: layers, with intervals over resamples.

A layer is the first from which something holds up to the end, so that one early layer that comes and goes decides
nothing. It is found on medians over prompts, again on every resample of seeds and prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakeeper.lens.separation import LEVEL
from deltakeeper.lens.trace_statistics import Floats

DEPARTS = 0.01
"""Nats of JS to the base from which a layer counts as departed; two coins of 0.50 and 0.57 are so far apart."""
RULES = {
    "departs": f"first layer from which the median JS to the base stays at {DEPARTS} nats or more to the end",
    "returns": "first layer, of those where the fine-tune has departed, from which the median of √JS to the base less "
    "√JS to the fine-tune stays below zero to the end",
}
"""To be printed beside the numbers."""


@dataclass(frozen=True)
class LayerEstimate:
    """A layer with its 95 % interval over resamples.

    Attributes:
        layer: its number; None for never.
        low: lower end; None for never.
        high: upper end; None for never.
        never: share of the resamples in which there is no such layer.
    """

    layer: int | None
    low: int | None
    high: int | None
    never: float


def find_departure(to_base: Floats, layers: Sequence[int], counts: Floats) -> LayerEstimate:
    """From where a variant's decoded distributions differ from the base's.

    Args:
        to_base: JS to the base in nats, (prompts, L).
        layers: numbers of the L layers.
        counts: how often each prompt counts, (resamples, prompts).
    """
    whole, drawn = (weighted_median(to_base, weights) >= DEPARTS for weights in (np.ones((1, len(to_base))), counts))
    return _estimate(whole, drawn, layers)


def find_return(
    to_base: Floats, to_tuned: Floats, departed: Floats, layers: Sequence[int], counts: Floats
) -> LayerEstimate:
    """From where a variant is nearer to the base than to the fine-tune.

    Args:
        to_base: JS of the variant to the base in nats, (prompts, L).
        to_tuned: JS of it to the fine-tune, (prompts, L).
        departed: JS of the fine-tune to the base, (prompts, L): before it has departed there is nothing to return from.
        layers: numbers of the L layers.
        counts: how often each prompt counts, (resamples, prompts).
    """
    nearer = np.sqrt(to_base) - np.sqrt(to_tuned)
    holds = []
    for weights in (np.ones((1, len(to_base))), counts):
        left = _lasting(weighted_median(departed, weights) >= DEPARTS)
        holds.append(left & (weighted_median(nearer, weights) < 0))
    return _estimate(holds[0], holds[1], layers)


def crossed_counts(
    seeds: Sequence[Hashable], prompts: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0
) -> Floats:
    """How often each reading counts when seeds and prompts are resampled, both with replacement, (resamples, n).

    Args:
        seeds: of the attack, of each of n readings.
        prompts: id of the prompt of each; one that was read under several seeds comes and goes as one.
        resamples: how many.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    found = np.ones((resamples, len(seeds)))
    for names in (seeds, prompts):
        known = {name: place for place, name in enumerate(dict.fromkeys(names))}
        drawn = random.multinomial(len(known), np.full(len(known), 1 / len(known)), size=resamples)
        found *= drawn[:, [known[name] for name in names]]
    return np.asarray(found[found.sum(1) > 0], dtype=np.float64)


def weighted_median(values: Floats, counts: Floats) -> Floats:
    """Lower median over prompts of values that count several times, NaN left out.

    Args:
        values: (prompts, L).
        counts: (resamples, prompts).

    Returns:
        (resamples, L); NaN where nothing counts.
    """
    found = np.full((len(counts), values.shape[1]), np.nan)
    for column, each in enumerate(values.T):
        known = np.flatnonzero(np.isfinite(each))
        order = known[np.argsort(each[known], kind="stable")]
        below = np.cumsum(counts[:, order], axis=1)
        if not len(order):
            continue
        place = (below >= below[:, -1:] / 2).argmax(1)
        found[:, column] = np.where(below[:, -1] > 0, each[order][place], np.nan)
    return found


def _lasting(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether it holds from here to the end, along the last axis."""
    return np.asarray(np.logical_and.accumulate(holds[..., ::-1], axis=-1)[..., ::-1])


def _estimate(whole: NDArray[np.bool_], drawn: NDArray[np.bool_], layers: Sequence[int]) -> LayerEstimate:
    count = len(layers)
    places = [count - _lasting(holds).sum(-1) for holds in (whole, drawn)]
    ends = np.quantile(places[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf").tolist()
    known = (int(places[0][0]), *map(int, ends))
    layer, low, high = (None if place == count else int(layers[place]) for place in known)
    return LayerEstimate(layer, low, high, float((places[1] == count).mean()))
