"""Random drops of an exact share of each level of a coded matrix, in memory that does not grow with the matrix."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words
from deltakeeper.layouts.masks import draw_words

Bytes = NDArray[np.uint8]

_BINS = 10  # leading bits of a random word that the first pass counts; one bin in 1024 is sorted in the second
_PAST = np.uint64(1 << 32)


def thin_out(codes: Bytes, share: float, key: tuple[int, int], *, never: int) -> torch.Tensor:
    """Packed mask that keeps all but `round(share * count)` entries of each level.

    Entry `i` (flat, row-major) has the random word of lane `i % 4` of Philox counter `i // 4`. Of a level with `count`
    entries those whose word is below the `round(share * count)`-th (from 0) least word of the level are dropped.

    Args:
        codes: uint8 `(out, in)`.
        share: 0 to 1.
        key: of the Philox stream.
        never: a level of which nothing is kept.

    Returns:
        int32 `(out, ceil(in/32))`.
    """
    out, columns = codes.shape
    thresholds = _thresholds(codes.reshape(-1), share, key)
    thresholds[never] = _PAST
    mask = zero_words(out, columns)
    for rows in row_blocks(out, columns):
        flat = codes[rows].reshape(-1)
        kept = np.empty(flat.size, dtype=np.bool_)
        for part, words in draw_words(key, rows.start * columns, flat.size):
            kept[part] = words >= thresholds[flat[part]]
        pack_rows(kept.reshape(-1, columns), byte_view(mask)[rows])
    return mask


def _thresholds(codes: Bytes, share: float, key: tuple[int, int]) -> NDArray[np.uint64]:
    """For each of 256 levels the least random word that is kept, 2^32 where none is."""
    low = np.uint32(32 - _BINS)
    counts = np.zeros(256 << _BINS, dtype=np.int64)
    for part, words in draw_words(key, 0, codes.size):
        counts += np.bincount(codes[part].astype(np.int64) << _BINS | words >> low, minlength=counts.size)
    below = np.cumsum(counts.reshape(256, -1), axis=1)
    drops = np.array([round(share * int(count)) for count in below[:, -1]])
    bins = np.argmax(below > drops[:, None], axis=1)  # of the threshold
    near: list[tuple[Bytes, NDArray[np.uint32]]] = []
    for part, words in draw_words(key, 0, codes.size):
        here = words >> low == bins[codes[part]]
        near.append((codes[part][here], words[here]))
    levels, left = (np.concatenate(found) for found in zip(*near, strict=True))
    thresholds = np.full(256, _PAST)
    for level in np.flatnonzero(below[:, -1] > drops):
        earlier = below[level, bins[level] - 1] if bins[level] else 0
        thresholds[level] = np.sort(left[levels == level])[drops[level] - earlier]
    return thresholds
