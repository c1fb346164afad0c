"""Numbers as letters: two or three a number, none of which means anything to HTML or JSON.

Probabilities and statistics are stored by their square roots, so that small numbers keep three digits too. `page.js`
reads them back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_LETTERS = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
_MOST = 64**2 - 2
_MIDDLE = 64**2 // 2


def pack_whole(values: NDArray[Any], letters: int) -> str:
    """Whole numbers from 0 below 64^letters, row by row."""
    flat = np.asarray(values, dtype=np.int64).ravel()
    digits = [(flat >> (6 * place)) & 63 for place in reversed(range(letters))]
    return _LETTERS[np.stack(digits, -1)].tobytes().decode("ascii")


def pack_shares(values: NDArray[Any]) -> str:
    """Numbers from 0 to 1 as two letters each, `00` for NaN; off by at most √p / 4000."""
    root = np.sqrt(np.clip(np.nan_to_num(values.astype(np.float64)), 0, 1))
    return pack_whole(np.where(np.isfinite(values), 1 + np.rint(root * _MOST), 0), 2)


def pack_signed(values: NDArray[Any], scale: float) -> str:
    """Numbers from −scale to scale as two letters each, `00` for those that are not finite."""
    known = np.isfinite(values)
    share = np.where(known, values, 0).astype(np.float64) / scale
    root = np.sign(share) * np.sqrt(np.minimum(np.abs(share), 1))
    return pack_whole(np.where(known, _MIDDLE + np.rint(root * (_MIDDLE - 1)), 0), 2)
