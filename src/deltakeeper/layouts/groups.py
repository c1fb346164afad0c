"""Groups of neighbours along the rows of a matrix: their scales and zero points, and the nearest codes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import row_blocks

Floats = NDArray[np.float32]


def groups_per_row(columns: int, group: int) -> int:
    """Number of groups in a row of `columns` entries; `group` 0 is a whole row."""
    return -(-columns // group) if group else 1


def spread_groups(numbers: torch.Tensor, group: int, columns: int) -> Floats:
    """One number per group to one per entry: `(rows, groups)` to float32 `(rows, in)`, or `(rows, 1)` to broadcast."""
    found: Floats = numbers.float().numpy()
    return found if found.shape[1] == 1 else np.repeat(found, group, axis=1)[:, :columns]


def group_scales(
    matrix: torch.Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of round-to-nearest, from the extreme entries of each group.

    Symmetric: `max|x| / (2^(bits-1) - 1/2)`, so that the largest magnitude lies half a step past the last code; one bit
    stands for a sign, whose best scale is `mean|x|`. Else `(max(x, 0) - min(x, 0)) / (2^bits - 1)`.

    Args:
        matrix: float32 `(out, in)`, finite.
        bits: 1 to 8.
        group: neighbours along `in` that share a scale, 0 for a whole row.
        symmetric: whether zero is the middle code.

    Returns:
        float32 `(out, groups)`, infinite where they overflow; uint8 `(out, groups)`, or None where
        `symmetric`.
    """
    out, columns = matrix.shape
    starts = np.arange(0, columns, group or columns)
    scale = torch.empty(out, len(starts))
    zero_point = torch.zeros(out, len(starts), dtype=torch.uint8)
    for rows in row_blocks(out, columns):
        block: Floats = matrix[rows].numpy()
        if symmetric and bits == 1:
            step = np.add.reduceat(np.abs(block), starts, axis=1, dtype=np.float64) / np.diff(starts, append=columns)
        elif symmetric:
            step = np.maximum.reduceat(np.abs(block), starts, axis=1) / np.float64(2 ** (bits - 1) - 0.5)
        else:
            low = np.minimum(np.minimum.reduceat(block, starts, axis=1), 0.0, dtype=np.float64)
            high = np.maximum(np.maximum.reduceat(block, starts, axis=1), 0.0, dtype=np.float64)
            step = (high - low) / (2**bits - 1)
            zero_point.numpy()[rows] = np.rint(-low / np.where(step > 0, step, np.inf))
        with np.errstate(over="ignore"):
            scale.numpy()[rows] = step
    return scale, None if symmetric else zero_point


def group_codes(
    matrix: torch.Tensor, scale: torch.Tensor, bits: int, group: int, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Nearest codes as they are packed, ties to even: uint8 `(out, in)`, each below `2^bits`.

    Where a scale is zero the code is the zero point.
    """
    out, columns = matrix.shape
    codes = torch.empty(out, columns, dtype=torch.uint8)
    for rows in row_blocks(out, columns):
        block: Floats = matrix[rows].numpy()
        if bits == 1 and zero_point is None:
            codes.numpy()[rows] = block >= 0
            continue
        step = scale[rows]
        nearest = block / spread_groups(torch.where(step > 0, step, torch.inf), group, columns)
        np.rint(nearest, out=nearest)
        if zero_point is None:
            nearest += np.float32(2 ** (bits - 1))
        else:
            nearest += spread_groups(zero_point[rows], group, columns)
        codes.numpy()[rows] = nearest.clip(0, 2**bits - 1, out=nearest)
    return codes
