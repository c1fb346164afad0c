"""Packed codes: per row a dense LSB-first stream of b-bit codes in int32 words, padding bits zero.

Code `i` of a row takes its bits `[i b, (i + 1) b)`, so codes may straddle words; one bit per code is the order of
`layouts.bits`, and 1 to 8 bits are the order of compressed-tensors' `pack_to_int32`. Eight codes fill b bytes
exactly: they are pushed together in three steps inside one 64-bit lane, block by block of rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import byte_view, padding_is_clear, row_blocks

Lanes = NDArray[np.uint64]


def code_words(columns: int, bits: int) -> int:
    """Number of int32 words that hold `columns` codes."""
    return -(-columns * bits // 32)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 `(rows, columns)`, each below `2^bits`, into int32 `(rows, ceil(columns * bits / 32))`."""
    rows, columns = codes.shape
    source: NDArray[np.uint8] = codes.numpy()
    words = torch.zeros(rows, code_words(columns, bits), dtype=torch.int32)
    packed = byte_view(words)
    width = columns + -columns % 8
    for block in row_blocks(rows, columns):
        padded = np.zeros((block.stop - block.start, width), dtype=np.uint8)
        padded[:, :columns] = source[block]
        lanes = padded.view(np.uint64)
        for half in (8, 16, 32):
            low, used = _low_halves(half, bits)
            lanes = (lanes & low) | ((lanes >> np.uint64(half - used)) & (low << np.uint64(used)))
        run = lanes.view(np.uint8).reshape(len(lanes), -1, 8)[:, :, :bits].reshape(len(lanes), -1)
        size = min(run.shape[1], packed.shape[1])  # bytes past the last word belong to padding codes
        packed[block, :size] = run[:, :size]
    return words


def unpack_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unpack int32 `(rows, ceil(columns * bits / 32))` into uint8 `(rows, columns)`."""
    packed = byte_view(words)
    codes = torch.empty(len(packed), columns, dtype=torch.uint8)
    groups = -(-columns // 8)
    size = min(groups * bits, packed.shape[1])
    for block in row_blocks(len(packed), columns):
        rows = block.stop - block.start
        run = np.zeros((rows, groups * bits), dtype=np.uint8)
        run[:, :size] = packed[block, :size]
        padded = np.zeros((rows, groups, 8), dtype=np.uint8)
        padded[:, :, :bits] = run.reshape(rows, groups, bits)
        lanes = padded.view(np.uint64)[:, :, 0]
        for half in (32, 16, 8):
            low, used = _low_halves(half, bits)
            lanes = (lanes & low) | ((lanes & (low << np.uint64(used))) << np.uint64(half - used))
        codes.numpy()[block] = lanes.view(np.uint8)[:, :columns]
    return codes


def code_padding_is_clear(words: torch.Tensor, bits: int, columns: int) -> bool:
    """Whether every bit past the last code of each row is zero, so that equal codes have equal bytes."""
    return padding_is_clear(words, columns * bits)


def _low_halves(half: int, bits: int) -> tuple[np.uint64, int]:
    """Mask of the bits in use in the lower one of each pair of lanes of `half` bits, and how many those are."""
    used = half * bits // 8
    return np.uint64(sum(((1 << used) - 1) << start for start in range(0, 64, 2 * half))), used
