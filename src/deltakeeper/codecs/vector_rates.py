"""How much ImPart keeps of each singular vector: rates that fall with its importance and fill a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.masks import draw_words
from deltakeeper.layouts.masks.seed import LEAST_RATE

Rates = NDArray[np.float32]

_STEPS = 30
_TERM_BYTES = 4  # its gain
_FACTOR_BYTES = 4  # its own gain, where its entries are floats
_VECTOR_BYTES = 4  # its rate, and as much for its scale where its entries are codes


@dataclass(frozen=True)
class Band:
    """Neighbouring vectors that are stored alike, in a term of their own.

    Attributes:
        start: first vector.
        stop: one past the last one.
        bits: of a code; None for floats.
        width: bits of a kept entry.
    """

    start: int
    stop: int
    bits: int | None
    width: int


class VectorRates:
    """The rule of one matrix, with the random words that will decide about its entries."""

    def __init__(
        self,
        shape: tuple[int, int],
        bands: list[Band],
        vectors: int,
        budget: int,
        keys: list[list[tuple[int, int]]],
    ) -> None:
        """Draw.

        Args:
            shape: `(out, in)` of the matrix.
            bands: how the vectors that are at hand would be stored.
            vectors: how many there are before any is dropped for the mean of the rates.
            budget: bytes.
            keys: Philox keys of each band's left and right vectors.
        """
        self._bands, self._vectors, self._budget = bands, vectors, budget
        self._words = [
            [_drawn(key, band.stop - band.start, length) for key, length in zip(pair, shape, strict=True)]
            for band, pair in zip(bands, keys, strict=True)
        ]

    def rates(self, values: torch.Tensor, power: float) -> torch.Tensor:
        """Share to keep of each vector, float32 `(kept,)`, those that are dropped whole left out; at least one.

        It is `1 - p` with `p = (1 - s / s_max) γ`, where `s` is a power of the singular value. The last vectors are
        dropped until the mean of `p` over all is `γ`, for the least `γ` whose bytes fit; what bytes the next vector
        leaves unused then go to all the others.

        Args:
            values: the largest singular values, falling, the first of them above 0.
            power: see above.
        """
        importance = (values.double() / float(values[0])).clamp_(0, 1).numpy() ** power

        def begun(gamma: float) -> Rates:
            kept = _thinned(importance, gamma)
            return kept[np.cumsum(kept) <= (1.0 - gamma) * self._vectors * (1 + 1e-6)]

        first = self._least(begun)
        if first is None:  # not even the first vector fits as it is
            single = self._least(lambda gamma: np.array([1.0 - gamma], dtype=np.float32))
            rate = 0.0 if single is None else float(single[0])
            return torch.tensor([rate if rate >= LEAST_RATE else 0.0])
        filled = self._least(lambda gamma: _thinned(importance[: first.size], gamma))
        return torch.from_numpy(first if filled is None else filled)

    def _least(self, rates_at: Callable[[float], Rates]) -> Rates | None:
        """The rates of the least γ in [0, 1] whose bytes fit; None where no γ gives any."""
        found = rates_at(0.0)
        if self._bytes(found) <= self._budget:
            return found
        low, high, best = 0.0, 1.0, None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            tried = rates_at(middle)
            if self._bytes(tried) <= self._budget:
                high, best = middle, tried
            else:
                low = middle
        return best if best is not None and best.size else None

    def _bytes(self, rates: Rates) -> int:
        """Payload of the terms with these rates, exactly, since the draws are known."""
        thresholds = (rates.astype(np.float64) * 2**32).astype(np.uint64)
        total = 0
        for band, factors in zip(self._bands, self._words, strict=True):
            mine = thresholds[band.start : band.stop, None]
            if not mine.size:
                break
            total += _TERM_BYTES
            for words in factors:
                count = int(np.count_nonzero(words[: len(mine)] < mine))
                total += len(mine) * _VECTOR_BYTES
                if band.bits is None:
                    total += _FACTOR_BYTES + count * band.width // 8
                else:
                    total += len(mine) * _VECTOR_BYTES + 4 * code_words(count, band.bits)
        return total


def _thinned(importance: NDArray[np.float64], gamma: float) -> Rates:
    kept: Rates = np.maximum(1.0 - gamma * (1.0 - importance), LEAST_RATE).astype(np.float32)
    return kept


def _drawn(key: tuple[int, int], rows: int, columns: int) -> NDArray[np.uint32]:
    """Random words of the entries of a matrix: uint32 `(rows, columns)`."""
    words = np.empty(rows * columns, dtype=np.uint32)
    for part, drawn in draw_words(key, 0, words.size):
        words[part] = drawn
    return words.reshape(rows, columns)
