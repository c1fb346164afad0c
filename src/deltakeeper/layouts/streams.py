"""One long stream of b-bit codes, such as those of a matrix's kept entries: `layouts.codes` with a single row.

Thirty-two codes of b bits fill b words exactly, so a stream is packed and read piece by piece.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.codes import code_words, pack_codes, unpack_codes

_PIECE = 1 << 18


def pack_stream(codes: NDArray[np.uint8], bits: int) -> torch.Tensor:
    """Pack `(count,)` codes below `2^bits` into int32 `(code_words(count, bits),)`."""
    words = torch.zeros(code_words(codes.size, bits), dtype=torch.int32)
    for start in range(0, codes.size, _PIECE):
        piece = pack_codes(torch.from_numpy(codes[None, start : start + _PIECE]), bits)[0]
        words[start // 32 * bits :][: piece.numel()] = piece
    return words


def unpack_stream(words: torch.Tensor, bits: int, start: int, stop: int) -> NDArray[np.uint8]:
    """The codes `start .. stop - 1` of a stream."""
    first = start // 32
    piece = unpack_codes(words[None, first * bits : code_words(stop, bits)], bits, stop - 32 * first)
    codes: NDArray[np.uint8] = piece[0].numpy()
    return codes[start - 32 * first :]
