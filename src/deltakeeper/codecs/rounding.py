"""Column rules of `quantise_columns` that round to the codes of a `grouped_int` term."""

from __future__ import annotations

import torch

from deltakeeper.layouts.grouped_int import GroupedInt
from deltakeeper.layouts.groups import groups_per_row

SHRINKS = tuple(1 - 0.04 * step for step in range(18))
"""Shares of the largest scale that a search tries, 1 to 0.32; below 5 bits, clipping the largest entries pays."""


SEARCHED = 1 << 15
"""Entries that all shares are tried on at once; one share after another would spend its time between operations."""


class NeighbourRounding:
    """Symmetric codes whose scales hold for `group` neighbouring columns in each row, as a span begins.

    Attributes:
        codes: int16 `(out, in)`, filled column by column.
        scale: float32 `(out, groups)`, values of 11 significant bits.
    """

    def __init__(self, out: int, columns: int, bits: int, group: int, *, search: bool = True) -> None:
        self._bits, self._group, self._search = bits, group, search
        self.span = group or columns
        self.codes = torch.zeros(out, columns, dtype=torch.int16)
        self.scale = torch.zeros(out, groups_per_row(columns, group))

    def look(self, columns: torch.Tensor, diagonal: torch.Tensor, start: int) -> None:
        """See `ColumnRule`: the scales of one group."""
        self.scale[:, start // self.span] = group_scale(columns, self._bits, search=self._search)

    def quantise(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """See `ColumnRule`."""
        scale = self.scale[:, index // self.span]
        codes = _nearest(column, scale, self._bits)
        self.codes[:, index] = codes
        return codes * scale

    def term(self) -> GroupedInt:
        """The matrix `(out, in)`, packed."""
        return GroupedInt.from_codes(self.codes, self.scale, bits=self._bits, group=self._group)


class ColumnRounding:
    """Symmetric codes whose scales hold for `group` neighbours within each column: those of the transposed matrix.

    Attributes:
        codes: int16 `(in, out)`, filled row by row.
        scale: float32 `(in, groups)`, values of 11 significant bits.
    """

    span = 1

    def __init__(self, out: int, columns: int, bits: int, group: int, *, search: bool = True) -> None:
        self._bits, self._group, self._search = bits, group, search
        self._width = group or out
        self.codes = torch.zeros(columns, out, dtype=torch.int16)
        self.scale = torch.zeros(columns, groups_per_row(out, group))

    def look(self, columns: torch.Tensor, diagonal: torch.Tensor, start: int) -> None:
        """See `ColumnRule`: the scales of one column."""
        column = columns[:, 0]
        groups = torch.nn.functional.pad(column, (0, -len(column) % self._width)).view(-1, self._width)
        self.scale[start] = group_scale(groups, self._bits, search=self._search)

    def quantise(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """See `ColumnRule`."""
        scale = self.scale[index].repeat_interleave(self._width)[: len(column)]
        codes = _nearest(column, scale, self._bits)
        self.codes[index] = codes
        return codes * scale

    def term(self) -> GroupedInt:
        """The transposed matrix `(in, out)`, packed."""
        return GroupedInt.from_codes(self.codes, self.scale, bits=self._bits, group=self._group)


def group_scale(values: torch.Tensor, bits: int, *, search: bool) -> torch.Tensor:
    """Scale of symmetric codes for each row: `max|v| / (2^(bits-1) - 1/2)`, or what has the least squared error.

    Args:
        values: float32 `(rows, width)`.
        bits: 2 to 8.
        search: try the `SHRINKS` of it with both signs, since there is one more code below zero than above; of equal
            ones the largest wins.

    Returns:
        float32 `(rows,)`, rounded to the 11 significant bits of float16.
    """
    widest = _eleven_bits(values.abs().amax(1) / (2 ** (bits - 1) - 0.5))
    if not search:
        return widest
    shares = torch.tensor([sign * share for share in SHRINKS for sign in (1, -1)])
    best = torch.empty_like(widest)
    step = max(1, SEARCHED // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        scales = _eleven_bits(shares[:, None] * widest[rows])  # (shares, rows)
        decoded = _nearest(values[rows], scales[:, :, None], bits).mul_(scales[:, :, None])
        error = decoded.sub_(values[rows]).square_().sum(2)
        first = torch.from_numpy(error.numpy().argmin(0))  # of equal ones NumPy takes the first
        best[rows] = scales.gather(0, first[None])[0]
    return best


def _nearest(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    divisor = torch.where(scale == 0, torch.inf, scale)
    return (values / divisor).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _eleven_bits(scale: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2048).round_() / 2048, exponent)
