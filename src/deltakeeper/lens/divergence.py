"""From which layer on two sets of prompts look different, for instance with and without a trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.separation import average_ranks
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, collect

DRAWS = 1000
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Divergence:
    """Where two sets of prompts part, in one statistic.

    Attributes:
        layer: number of the first layer from which `separation` stays above `bar` up to the last; None without one.
        layers: int32 (L,).
        separation: float64 (L,), |AUC − ½| between the sets: 0 alike, ½ apart without overlap.
        bar: what the largest separation over all layers stays under in 95 % of shuffles of the sets' labels.
        first: prompts in the first set.
        second: prompts in the second.
        definition: the words to print beside the number.
    """

    layer: int | None
    layers: np.ndarray[tuple[int], np.dtype[np.int32]]
    separation: Floats
    bar: float
    first: int
    second: int
    definition: str


def find_divergence(
    first: Sequence[LensTrace],
    second: Sequence[LensTrace],
    name: str,
    position: int = -1,
    *,
    paired: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Divergence:
    """First layer from which a statistic tells two sets of prompts apart and goes on doing so.

    The bar comes from shuffled labels, and from the largest value over layers, so that among many layers none passes it
    by luck more often than in one of twenty comparisons.

    Args:
        first: one variant on one set of prompts (with the trigger).
        second: the same variant on the other (without it).
        name: as for `read_statistic`.
        position: place in the traces' positions.
        paired: whether the n-th prompts of both sets belong together; labels are then shuffled within pairs.
        draws: number of shuffles.
        seed: of the shuffles.

    Raises:
        DataError: as `collect`; a number is missing; or sets are to be paired and differ in size.
    """
    one, other = collect(first, name, position), collect(second, name, position)
    if not np.array_equal(first[0].layers, second[0].layers):
        raise DataError("lens traces of different layers cannot be put side by side; trace the same layers.")
    values = np.concatenate([one, other])
    if not np.isfinite(values).all():
        raise DataError(f"the statistic {name!r} is missing on some prompts; leave those out.")
    n, m = len(one), len(other)
    if paired and n != m:
        raise DataError(f"{n} and {m} prompts make no pairs; give as many of each.")
    ranks = average_ranks(values)
    rng = np.random.default_rng(seed)
    labels = np.zeros((draws + 1, n + m))
    labels[0, :n] = 1  # the sets as they are count among their own shuffles, which keeps the level exact
    for row in labels[1:]:
        row[np.arange(n) + n * rng.integers(0, 2, n) if paired else rng.permutation(n + m)[:n]] = 1
    separation = np.abs((labels @ ranks - n * (n + 1) / 2) / (n * m) - 0.5)
    largest = np.sort(separation.max(1))
    bar = float(largest[int(np.ceil((1 - ALPHA) * (draws + 1))) - 1])
    unbroken = int(np.cumprod(separation[0, ::-1] > bar).sum())
    layers = first[0].layers
    return Divergence(
        layer=int(layers[len(layers) - unbroken]) if unbroken else None,
        layers=layers,
        separation=separation[0],
        bar=bar,
        first=n,
        second=m,
        definition=(
            f"first layer from which {name} separates the sets (|AUC − ½| > {bar:.3f}, the 95 % point of {draws} "
            f"shuffles{' within pairs' * paired}, largest over layers) up to the last; {n} and {m} prompts"
        ),
    )
