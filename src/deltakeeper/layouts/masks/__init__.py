"""Masks: which entries of a matrix are kept, stored as bits, as a seed, as gaps or as two of each four.

Every kind gives the same packed bits; they differ in what they cost and in which masks they can say.
"""

from deltakeeper.layouts.masks.base import Mask, check_count
from deltakeeper.layouts.masks.bits import BitMask
from deltakeeper.layouts.masks.choice import MASKS, best_mask, expected_mask_bytes
from deltakeeper.layouts.masks.draws import draw_words
from deltakeeper.layouts.masks.entries import chosen_rows, gather
from deltakeeper.layouts.masks.gaps import GapMask
from deltakeeper.layouts.masks.seed import SeedMask
from deltakeeper.layouts.masks.two_four import TwoFourMask

__all__ = [
    "MASKS",
    "BitMask",
    "GapMask",
    "Mask",
    "SeedMask",
    "TwoFourMask",
    "best_mask",
    "check_count",
    "chosen_rows",
    "draw_words",
    "expected_mask_bytes",
    "gather",
]
