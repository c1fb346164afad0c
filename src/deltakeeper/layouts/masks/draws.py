"""The random words of a tensor's entries, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deltakeeper.layouts.philox import philox

_COUNTERS = 1 << 14


def draw_words(key: tuple[int, int], start: int, count: int) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
    """The words of entries `start .. start + count - 1` (flat, row-major), with their places counted from `start`.

    Entry `i` has lane `i % 4` of Philox counter `i // 4`, as in `philox.seeded_mask`.
    """
    stop = start + count
    for counter in range(start // 4, -(-stop // 4), _COUNTERS):
        last = min(counter + _COUNTERS, -(-stop // 4))
        low, high = max(start, 4 * counter), min(stop, 4 * last)
        words = philox(key, counter, last - counter).reshape(-1)
        yield slice(low - start, high - start), words[low - 4 * counter : high - 4 * counter]
