"""Pruning together with rounding: which entries of a matrix stay, and what code each gets on its row's grid."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.box import MARGIN
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.largest import kept_of, largest_of_tensor
from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, unpack_bits, unpack_rows, zero_words

SHRINKS = tuple(1 - step / 100 for step in range(80))
SHRINK_NORM = 2.4

Floats = NDArray[np.float32]


class PrunedRounding:
    """Column rule (`gptq.ColumnRule`) that prunes by `w² / U²` and rounds what is left to a grid per row.

    Attributes:
        span: columns that are pruned together.
        kept: bool `(in, out)`, whether an entry is kept.
        codes: int8 `(in, out)`, 0 where nothing is kept.
    """

    def __init__(self, shape: tuple[int, int], scale: torch.Tensor, bits: int, keep: float | None, span: int) -> None:
        """Take the grid, and how to prune.

        Args:
            shape: `(out, in)` of the matrix.
            scale: float32 `(out,)`, distance of neighbouring values.
            bits: of a code, 2 to 8.
            keep: share of the entries of a span to keep; None for two of each four.
            span: columns of a span, where `keep` is given.
        """
        out, columns = shape
        self._step = torch.where(scale == 0, torch.inf, scale)
        self._scale, self._limit, self._keep = scale, 2 ** (bits - 1), keep
        self.span = 4 if keep is None else span
        self.kept = torch.zeros(columns, out, dtype=torch.bool)
        self.codes = torch.zeros(columns, out, dtype=torch.int8)

    def look(self, columns: torch.Tensor, diagonal: torch.Tensor, start: int) -> None:
        """See `ColumnRule`: which entries of a span stay; of equal ones the first."""
        loss: Floats = (columns / diagonal).contiguous().numpy()  # the root of the loss but for its sign
        if self._keep is None:
            chosen = torch.from_numpy(two_of_four(loss))
        else:
            chosen = unpack_bits(largest_of_tensor(loss, self._keep), loss.shape[1])
        self.kept[start : start + loss.shape[1]] = chosen.T

    def quantise(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """See `ColumnRule`."""
        codes = (column / self._step).round_().clamp_(-self._limit, self._limit - 1).mul_(self.kept[index])
        self.codes[index] = codes
        return codes * self._scale


def prune_and_round(
    matrix: torch.Tensor, scale: torch.Tensor, bits: int, keep: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune by magnitude and round to nearest, with equal weights and nothing paid back, block by block.

    Args:
        matrix: float32 `(out, in)`.
        scale: float32 `(out,)`, distance of neighbouring values.
        bits: of a code, 2 to 8.
        keep: share of all entries to keep; None for two of each four.

    Returns:
        Codes, int8 `(out, in)`, and the packed mask of the kept ones, int32 `(out, ceil(in/32))`.
    """
    out, columns = matrix.shape
    limit = 2 ** (bits - 1)
    step = torch.where(scale == 0, torch.inf, scale).numpy()[:, None]
    words = zero_words(out, columns) if keep is None else largest_of_tensor(matrix.numpy(), keep)
    codes = torch.empty(out, columns, dtype=torch.int8)
    for rows in row_blocks(out, columns):
        block: Floats = matrix[rows].numpy()
        if keep is None:
            chosen = two_of_four(block)
            pack_rows(chosen, byte_view(words)[rows])
        else:
            chosen = unpack_rows(byte_view(words)[rows], columns).view(np.bool_)
        codes.numpy()[rows] = np.rint(block / step[rows]).clip(-limit, limit - 1) * chosen
    return codes, words


def two_of_four(values: Floats) -> NDArray[np.bool_]:
    """The two largest magnitudes of each four columns, of equal ones the first; of a shorter last group up to two."""
    rows, columns = values.shape
    padded = np.full((rows, -(-columns // 4) * 4), -1, dtype=np.float32)
    np.abs(values, out=padded[:, :columns])
    fours = [padded[:, place::4] for place in range(4)]
    chosen = np.empty(padded.shape, dtype=np.bool_)
    for place, mine in enumerate(fours):
        ahead = np.zeros(mine.shape, dtype=np.uint8)
        for other, theirs in enumerate(fours):
            if other != place:
                ahead += theirs >= mine if other < place else theirs > mine
        chosen[:, place::4] = ahead < 2
    return chosen[:, :columns]


def row_steps(matrix: torch.Tensor, bits: int, *, search: bool) -> torch.Tensor:
    """Step `2 max|D| / (2^bits - 1)` of each row, float32 `(out,)`; 0 of a row of zeros.

    Args:
        matrix: float32 `(out, in)`.
        bits: of a code, 2 to 8.
        search: take the share of it, from 1 to 0.21, with the least sum of `|error|^2.4`; of equal ones the largest.
    """
    limit = 2 ** (bits - 1)
    steps = torch.empty(len(matrix))
    for rows in row_blocks(matrix.shape[0], matrix.shape[1]):
        block: Floats = matrix[rows].numpy()
        widest = np.abs(block).max(axis=1) / np.float32(limit - 0.5)
        best, least = widest.copy(), np.full(len(block), np.inf)
        for share in SHRINKS if search else ():
            step = widest * np.float32(share)
            codes = np.rint(block / np.where(step > 0, step, np.float32(np.inf))[:, None]).clip(-limit, limit - 1)
            error = (np.abs(codes * step[:, None] - block) ** np.float32(SHRINK_NORM)).sum(axis=1)
            better = error < least
            best, least = np.where(better, step, best), np.where(better, error, least)
        steps.numpy()[rows] = best
    return steps


def pruned_cells(matrix: torch.Tensor, scale: torch.Tensor, bits: int, keep: float | None) -> Cells:
    """What `prune_and_round` prunes and rounds alike, with the largest entries of each row as they are.

    Args:
        matrix: float32 `(out, in)`.
        scale: float32 `(out,)`, what `row_steps` gives without a search.
        bits: of a code, 2 to 8.
        keep: share of all entries to keep; None for two of each four.
    """
    _, words = prune_and_round(matrix, scale, bits, keep)
    kept = unpack_bits(words, matrix.shape[1])
    size = matrix.abs()
    border = _border(size, kept, None if keep is None else kept_of(matrix.numel(), keep))
    widest = size.amax(1, keepdim=True)
    rounded = (matrix / torch.where(scale == 0, torch.inf, scale)[:, None]).round_()
    number = rounded.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    half, step = 0.5 - MARGIN, scale[:, None]
    low, high = torch.maximum((number - half) * step, -widest), torch.minimum((number + half) * step, widest)
    # a kept entry stays on its side of zero and above the border, a dropped one within it
    stays = border * (1 + MARGIN)
    low = torch.where(kept & (matrix > 0), torch.maximum(low, stays), low)
    high = torch.where(kept & (matrix < 0), torch.minimum(high, -stays), high)
    high = torch.where(kept & (number == number.new_tensor(2 ** (bits - 1) - 1)), widest, high)
    low = torch.where(kept & (number == number.new_tensor(-(2 ** (bits - 1)))), -widest, low)
    within = torch.minimum(border * (1 - MARGIN), widest)
    low, high = torch.where(kept, low, -within), torch.where(kept, high, within)
    fixed = size == widest
    return Cells.around(matrix, torch.where(fixed, matrix, low), torch.where(fixed, matrix, high))


def _border(size: torch.Tensor, kept: torch.Tensor, wanted: int | None) -> torch.Tensor:
    """A magnitude between what is kept and what is dropped, in each four columns or (`wanted` given) everywhere."""
    out, columns = size.shape
    if wanted is None:
        room = -columns % 4
        fours = torch.nn.functional.pad(size, (0, room)).view(out, -1, 4)
        chosen = torch.nn.functional.pad(kept, (0, room)).view(out, -1, 4)
        least = fours.masked_fill(~chosen, torch.inf).amin(2)
        most = fours.masked_fill(chosen, 0.0).amax(2)
        middle = torch.where(torch.isinf(least), most, (least + most) / 2)
        return middle.repeat_interleave(4, dim=1)[:, :columns]
    if int(kept.sum()) < wanted:  # all others are zeros
        return torch.zeros(1, 1)
    return (size.masked_fill(~kept, torch.inf).amin() + size.masked_fill(kept, 0.0).amax()).reshape(1, 1) / 2
