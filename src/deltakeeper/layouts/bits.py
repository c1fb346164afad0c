"""Packed bits: per row a dense little-endian, LSB-first bit stream in int32 words, padding bits zero.

Bit `i` of a row lies in word `i // 32` at position `i % 32`, which is the byte order of
`numpy.packbits(bitorder="little")` padded to four bytes, so that packing never needs a wide temporary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK_ENTRIES = 1 << 18  # float32 blocks of 1 MiB stay in the cache of one core
_POPCOUNT: Bytes = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def words_per_row(columns: int) -> int:
    """Number of int32 words that hold `columns` bits."""
    return -(-columns // 32)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, each of about `BLOCK_ENTRIES` entries, that cover `rows` in order."""
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def zero_words(rows: int, columns: int) -> torch.Tensor:
    """All-clear packed matrix: int32 `(rows, ceil(columns/32))`."""
    return torch.zeros(rows, words_per_row(columns), dtype=torch.int32)


def byte_view(words: torch.Tensor) -> Bytes:
    """The same memory as bytes: `(rows, words)` int32 -> `(rows, 4 * words)` uint8."""
    array: NDArray[np.int32] = words.numpy()
    return array.view(np.uint8)


def pack_rows(bits: NDArray[np.bool_], into: Bytes) -> None:
    """Pack `(rows, columns)` booleans into the matching rows of a `byte_view`."""
    rows, columns = bits.shape
    if columns % 8 == 0:  # whole bytes: one long run packs faster than many short ones
        into[:, : columns // 8] = np.packbits(bits.reshape(-1), bitorder="little").reshape(rows, -1)
    else:
        into[:, : -(-columns // 8)] = np.packbits(bits, axis=1, bitorder="little")


def unpack_rows(packed: Bytes, columns: int) -> Bytes:
    """Rows of a `byte_view` -> `(rows, columns)` uint8 of zeros and ones."""
    return np.unpackbits(packed, axis=1, count=columns, bitorder="little")


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack a boolean `(rows, columns)` tensor into int32 `(rows, ceil(columns/32))`."""
    rows, columns = bits.shape
    words = zero_words(rows, columns)
    pack_rows(np.ascontiguousarray(bits.numpy()), byte_view(words))
    return words


def unpack_bits(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack int32 `(rows, ceil(columns/32))` into a boolean `(rows, columns)` tensor."""
    return torch.from_numpy(unpack_rows(byte_view(words), columns).view(np.bool_))


def padding_is_clear(words: torch.Tensor, columns: int) -> bool:
    """Whether every bit past `columns` is zero, so that equal masks have equal bytes."""
    used = columns % 32
    if not used:
        return True
    last: NDArray[np.uint32] = words[:, -1].numpy().view(np.uint32)
    return not bool((last >> np.uint32(used)).any())


def is_subset(words: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether every bit set in `words` is also set in `of`."""
    return not bool(torch.any(words & ~of))


def count_bits(words: torch.Tensor) -> int:
    """Number of set bits, counted block by block."""
    packed = byte_view(words)
    return sum(int(_POPCOUNT[packed[rows]].sum(dtype=np.int64)) for rows in row_blocks(*packed.shape))
