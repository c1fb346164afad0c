"""Uniform grids of b-bit codes that contain zero: one step for a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from deltakeeper.codecs.box import MARGIN
from deltakeeper.layouts.bits import row_blocks


@dataclass(frozen=True)
class Grid:
    """Values `step * (code - zero_point)` for the codes `0 .. 2^bits - 1`.

    Attributes:
        step: distance of neighbours, above 0.
        zero_point: code of zero.
        bits: 2 to 8.
    """

    step: float
    zero_point: int
    bits: int

    @classmethod
    def symmetric(cls, peak: float, bits: int) -> Self:
        """Zero in the middle; the largest magnitude lies half a step past the last code, as usual for weights."""
        middle = 2 ** (bits - 1)
        return cls(peak / (middle - 0.5) or 1.0, middle, bits)

    @classmethod
    def spanning(cls, low: float, high: float, bits: int) -> Self:
        """From the least to the largest value, stretched to contain zero and shifted so that zero is a code."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (2**bits - 1) or 1.0
        return cls(step, round(-low / step), bits)

    def codes(self, matrix: torch.Tensor) -> torch.Tensor:
        """Nearest code of each entry (ties to even): float32 `(out, in)` -> uint8 `(out, in)`."""
        found = torch.empty(matrix.shape, dtype=torch.uint8)
        for rows in row_blocks(matrix.shape[0], matrix.shape[1]):
            nearest = np.rint(matrix[rows].numpy() / np.float64(self.step)) + self.zero_point
            found.numpy()[rows] = np.clip(nearest, 0, 2**self.bits - 1)
        return found

    def cells(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and largest value of the same code for each entry, `-inf` and `inf` past the outermost codes."""
        codes = self.codes(matrix)
        middle = codes.double().sub_(self.zero_point)
        half = 0.5 - MARGIN
        low = ((middle - half) * self.step).float().masked_fill_(codes == 0, -torch.inf)
        high = ((middle + half) * self.step).float().masked_fill_(codes == 2**self.bits - 1, torch.inf)
        return low, high
