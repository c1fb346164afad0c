"""The choice itself: one point of each curve, least total error within a number of bytes.

A multiple-choice knapsack, solved by merging curves one after another and keeping of every sum of bytes
the least error (Nemhauser and Ullmann, 1969). While fewer than `STATES` sums survive, the result is the optimum; beyond
that, sums are thinned to the best one in each narrow range of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 12
"""Sums that are kept; the ranges of bytes are a power of two wide, so that budgets near each other share them."""


@dataclass(frozen=True)
class Front:
    """Sums that no other beats: bytes rising, error falling, and where each came from."""

    sizes: NDArray[np.int64]
    errors: NDArray[np.float64]
    parent: NDArray[np.int32]
    point: NDArray[np.int32]


def choose(curves: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Index of the point to take of each curve.

    Args:
        curves: of each tensor, its points as (bytes, error).
        budget: the most bytes that the points may add up to.

    Returns:
        The indices, or None where even the smallest points do not fit.
    """
    if sum(min(size for size, _ in curve) for curve in curves) > budget:
        return None
    order = sorted(range(len(curves)), key=lambda i: -max(size for size, _ in curves[i]))
    smallest = [min(size for size, _ in curves[i]) for i in order]
    fronts = [_start()]
    for step, index in enumerate(order):
        room = budget - sum(smallest[step + 1 :])
        fronts.append(_merge(fronts[-1], curves[index], room, budget))
    chosen = [0] * len(curves)
    state = len(fronts[-1].sizes) - 1  # the largest of the front has the least error
    for step in range(len(order) - 1, -1, -1):
        front = fronts[step + 1]
        chosen[order[step]] = int(front.point[state])
        state = int(front.parent[state])
    return chosen


def _start() -> Front:
    none = np.zeros(1, dtype=np.int32)
    return Front(np.zeros(1, dtype=np.int64), np.zeros(1), none, none)


def _merge(front: Front, curve: Sequence[tuple[int, float]], room: int, budget: int) -> Front:
    sizes = np.array([size for size, _ in curve], dtype=np.int64)
    errors = np.array([error for _, error in curve])
    all_sizes = (front.sizes[:, None] + sizes).reshape(-1)
    all_errors = (front.errors[:, None] + errors).reshape(-1)
    fitting = np.flatnonzero(all_sizes <= room)
    order = fitting[np.lexsort((all_errors[fitting], all_sizes[fitting]))]
    best = np.minimum.accumulate(all_errors[order])
    better = np.ones(len(order), dtype=np.bool_)
    better[1:] = all_errors[order][1:] < best[:-1]
    order = order[better]
    if len(order) > STATES:
        order = _thin(order, all_sizes[order], budget)
    parent, point = np.divmod(order, len(curve))
    return Front(all_sizes[order], all_errors[order], parent.astype(np.int32), point.astype(np.int32))


def _thin(order: NDArray[np.intp], sizes: NDArray[np.int64], budget: int) -> NDArray[np.intp]:
    """The last sum of each range of bytes, which has the range's least error; and the very first, which always fits."""
    width = 1 << max(0, (2 * budget // STATES).bit_length() - 1)
    bins = sizes // width
    last = np.append(bins[1:] != bins[:-1], True)
    last[0] = True
    kept: NDArray[np.intp] = order[last]
    return kept
