"""Which entries of a matrix are largest by magnitude: exact counts, ties broken in row-major order, zeros never."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words


def kept_of(entries: int, keep: float) -> int:
    """`ceil(keep * entries)`, but for what floating point adds: 7 of 100 at 0.07, whose product is above 7."""
    return math.ceil(round(keep * entries, 6))


def largest_of_tensor(values: NDArray[np.float32], keep: float) -> torch.Tensor:
    """Packed mask of the `ceil(keep * entries)` largest magnitudes; needs one float32 copy."""
    out, columns = values.shape
    magnitudes = np.abs(values).reshape(-1)
    count = kept_of(magnitudes.size, keep)
    magnitudes.partition(magnitudes.size - count)
    threshold = magnitudes[magnitudes.size - count]
    ties = count - int(np.count_nonzero(magnitudes > threshold))
    del magnitudes
    mask = zero_words(out, columns)
    for rows in row_blocks(out, columns):
        block = np.abs(values[rows])
        chosen = block > threshold
        if ties and threshold > 0:
            first = np.flatnonzero(block == threshold)[:ties]
            chosen.reshape(-1)[first] = True
            ties -= first.size
        pack_rows(chosen, byte_view(mask)[rows])
    return mask


def largest_of_rows(values: NDArray[np.float32], keep: float) -> torch.Tensor:
    """Packed mask of the `ceil(keep * in)` largest magnitudes of each row."""
    out, columns = values.shape
    count = kept_of(columns, keep)
    mask = zero_words(out, columns)
    for rows in row_blocks(out, columns):
        block = np.abs(values[rows])
        threshold = np.partition(block, columns - count, axis=1)[:, columns - count, None]
        above, tied = block > threshold, block == threshold
        ties = count - np.count_nonzero(above, axis=1, keepdims=True)
        chosen = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= ties))
        pack_rows(chosen & (block > 0), byte_view(mask)[rows])
    return mask
