"""Which entries of a matrix are largest by magnitude: exact counts, ties broken in row-major order, zeros never."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.box import MARGIN
from deltakeeper.codecs.cells import Cells
from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words


def kept_of(entries: int, keep: float) -> int:
    """`ceil(keep * entries)`, but for what floating point adds: 7 of 100 at 0.07, whose product is above 7."""
    return math.ceil(round(keep * entries, 6))


def largest_of_tensor(values: NDArray[np.float32], keep: float) -> torch.Tensor:
    """Packed mask of the `ceil(keep * entries)` largest magnitudes; needs no copy of the matrix."""
    out, columns = values.shape
    threshold, ties = _threshold(values, kept_of(values.size, keep))
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


def _threshold(values: NDArray[np.float32], count: int) -> tuple[np.float32, int]:
    """The `count`-th largest magnitude, and how many of the entries equal to it are among the `count` largest.

    The bits of a float that is not negative are in the order of its value, so their upper and then their lower halves
    are counted. Deltas of bfloat16 weights have few distinct values, with which a partition takes ten times as long.
    """
    upper, left = _find(_histogram(values, None), count)
    lower, left = _find(_histogram(values, upper), left)
    return np.array([upper << 16 | lower], dtype=np.uint32).view(np.float32)[0], left


def _histogram(values: NDArray[np.float32], upper: int | None) -> NDArray[np.int64]:
    """How often each upper half of a magnitude occurs, or each lower half of those with a given upper one."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for rows in row_blocks(*values.shape):
        bits = np.abs(values[rows]).view(np.uint32).reshape(-1)
        halves = bits >> np.uint32(16)
        if upper is not None:
            halves = bits[halves == upper] & np.uint32(0xFFFF)
        counts += np.bincount(halves, minlength=1 << 16)
    return counts


def _find(counts: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th entry from above, and how many of its own entries that includes."""
    from_above = counts[::-1].cumsum()
    place = int(np.searchsorted(from_above, count))
    return len(counts) - 1 - place, count - int(from_above[place] - counts[::-1][place])


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


def box_of_largest(matrix: torch.Tensor, kept: torch.Tensor, wanted: int, *, by_row: bool) -> Cells:
    """Kept entries as they are, all others of smaller magnitude than the least of those.

    Args:
        matrix: float32 `(out, in)`.
        kept: its largest entries, bool `(out, in)`.
        wanted: how many were to be kept of the matrix, or of each row; with fewer, all others are zeros and stay so.
        by_row: whether rows are pruned apart.
    """
    size = matrix.abs()
    least = torch.where(kept, size, torch.inf)
    if by_row:
        limit = torch.where(kept.sum(1, keepdim=True) == wanted, least.amin(1, keepdim=True), 0.0)  # (out, 1)
    else:
        limit = least.amin() if int(kept.sum()) == wanted else torch.zeros(())
    limit = limit * (1 - MARGIN)
    return Cells.around(matrix, torch.where(kept, matrix, -limit), torch.where(kept, matrix, limit))
