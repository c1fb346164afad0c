"""Masks that cost no bytes: Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator.

Entry `i` of a tensor (flat, row-major) reads lane `i % 4` of counter `i // 4`; the key comes from the seed and
the tensor's name, so a mask does not depend on the device, the number of threads or the order of tensors.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_CHUNK = 1 << 14


def philox_key(seed: int, name: str) -> tuple[int, int]:
    """The first eight bytes of SHA-256(seed as little-endian u64, then the name) as two little-endian u32."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(key: tuple[int, int], first: int, count: int) -> NDArray[np.uint32]:
    """Random words of the counters `first .. first + count - 1`: uint32 `(count, 4)`."""
    counters = np.arange(first, first + count, dtype=np.uint64)
    x0, x1 = counters & _LOW, counters >> _HALF
    x2, x3 = np.zeros_like(x0), np.zeros_like(x0)
    for step in range(_ROUNDS):
        k0, k1 = (np.uint64((word + step * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        left, right = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x1 ^= k0
        x3 ^= k1
        x0, x1 = (right >> _HALF) ^ x1, right & _LOW
        x2, x3 = (left >> _HALF) ^ x3, left & _LOW
    words = np.empty((count, 4), dtype=np.uint32)
    for lane, values in enumerate((x0, x1, x2, x3)):
        words[:, lane] = values
    return words


def seeded_mask(shape: tuple[int, int], *, seed: int, name: str, keep: float) -> torch.Tensor:
    """Packed mask whose bits are set with probability `keep`.

    Args:
        shape: `(out, in)` of the matrix.
        seed: 0 to 2^64 - 1.
        name: checkpoint name of the tensor.
        keep: an entry is kept iff its 32-bit word is below `floor(keep * 2^32)`.

    Returns:
        int32 `(out, ceil(in/32))`, padding bits zero.
    """
    rows, columns = shape
    key, threshold = philox_key(seed, name), np.uint64(int(keep * 2**32))
    words = zero_words(rows, columns)
    packed = byte_view(words)
    for block in row_blocks(rows, columns):
        start, stop = block.start * columns, block.stop * columns
        kept = np.empty(stop - start, dtype=np.bool_)
        for counter in range(start // 4, -(-stop // 4), _CHUNK):
            count = min(_CHUNK, -(-stop // 4) - counter)
            chosen = philox(key, counter, count).reshape(-1) < threshold
            low, high = max(start, counter * 4), min(stop, (counter + count) * 4)
            kept[low - start : high - start] = chosen[low - counter * 4 : high - counter * 4]
        pack_rows(kept.reshape(-1, columns), packed[block])
    return words
