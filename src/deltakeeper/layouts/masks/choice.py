"""All kinds of masks by name, and the choice between those that can say any mask."""

from __future__ import annotations

import numpy as np
import torch

from deltakeeper.layouts.bits import count_bits, words_per_row
from deltakeeper.layouts.masks.base import Mask
from deltakeeper.layouts.masks.bits import BitMask
from deltakeeper.layouts.masks.gaps import ESCAPE, GapMask
from deltakeeper.layouts.masks.seed import SeedMask
from deltakeeper.layouts.masks.two_four import TwoFourMask

MASKS: dict[str, type[Mask]] = {kind.kind: kind for kind in (BitMask, SeedMask, GapMask, TwoFourMask)}


def best_mask(words: torch.Tensor, columns: int) -> Mask:
    """Packed bits `(out, ceil(in/32))` as bits or as gaps, whichever takes fewer bytes; bits if equal."""
    bits = BitMask(words)
    if count_bits(words) + 4 * words.shape[0] >= bits.nbytes:
        return bits
    gaps = GapMask.from_words(words, columns)
    return gaps if gaps.nbytes < bits.nbytes else bits


def expected_mask_bytes(shape: tuple[int, int], kept: int) -> int:
    """Bytes of the best mask where `kept` entries lie anywhere with equal chance."""
    out, columns = shape
    bits = 4 * out * words_per_row(columns)
    share = min(1.0, kept / (out * columns))
    skipped = np.arange(ESCAPE, columns, ESCAPE, dtype=np.float64)  # each multiple within a gap is an escape
    escapes = out * float((share * (columns - skipped) * (1.0 - share) ** skipped).sum())
    return min(bits, 4 * out + kept + round(escapes))
