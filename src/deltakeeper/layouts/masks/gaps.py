"""Masks of distances between kept entries, the smaller kind below about one entry in eight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Settings, TensorSpec
from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, unpack_rows, zero_words
from deltakeeper.layouts.masks.base import Mask, check_count
from deltakeeper.layouts.settings import SettingsReader

ESCAPE = 255
_CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class GapMask(Mask):
    """Distances between kept entries of a row, one byte each, with an escape.

    A byte below 255 skips that many columns and keeps the next one; 255 skips 255 columns and keeps none. A row starts
    before its first column and ends with a kept entry, so an empty row has no bytes.

    Attributes:
        gaps: uint8 `(bytes,)`, row after row.
        row_bytes: int32 `(out,)`, bytes of each row.
    """

    kind: ClassVar[str] = "gaps"

    gaps: torch.Tensor
    row_bytes: torch.Tensor

    @classmethod
    def from_words(cls, words: torch.Tensor, columns: int) -> Self:
        """The gaps of packed bits `(out, ceil(in/32))`."""
        out = words.shape[0]
        row_bytes = torch.zeros(out, dtype=torch.int32)
        runs = [np.zeros(0, dtype=np.uint8)]
        for rows in row_blocks(out, columns):
            row, column = np.nonzero(unpack_rows(byte_view(words)[rows], columns))
            before = np.empty_like(column)  # the column of the kept entry before this one, -1 at the start of a row
            before[:1], before[1:] = -1, np.where(row[1:] == row[:-1], column[:-1], -1)
            skipped = column - before - 1
            escapes = skipped // ESCAPE
            run = np.full(int(escapes.sum()) + row.size, ESCAPE, dtype=np.uint8)
            run[np.cumsum(escapes + 1) - 1] = skipped % ESCAPE
            runs.append(run)
            row_bytes.numpy()[rows] = np.bincount(row, weights=escapes + 1, minlength=rows.stop - rows.start)
        return cls(torch.from_numpy(np.concatenate(runs)), row_bytes)

    def words(self, shape: tuple[int, int]) -> torch.Tensor:
        """The packed bits, block by block."""
        out, columns = shape
        words = zero_words(out, columns)
        for rows in row_blocks(out, columns):
            row, column, keeps = self._walk(rows)
            chosen = np.zeros((rows.stop - rows.start, columns), dtype=np.bool_)
            chosen[row[keeps], column[keeps]] = True
            pack_rows(chosen, byte_view(words)[rows])
        return words

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_gaps` and `delta_row_bytes`."""
        return {"delta_gaps": self.gaps, "delta_row_bytes": self.row_bytes}

    def settings(self) -> Settings:
        """`gap_bytes`: how many."""
        return {"gap_bytes": self.gaps.numel()}

    @classmethod
    def expect(cls, shape: tuple[int, int], nnz: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Mask.expect`."""
        most = nnz + shape[0] * (shape[1] // ESCAPE)
        count = SettingsReader("sparse", settings).integer("gap_bytes", nnz, most)
        return {
            "delta_gaps": TensorSpec(torch.uint8, (count,)),
            "delta_row_bytes": TensorSpec(torch.int32, (shape[0],)),
        }

    @classmethod
    def from_tensors(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See `Mask.from_tensors`."""
        return cls(tensors["delta_gaps"], tensors["delta_row_bytes"])

    def check(self, shape: tuple[int, int], nnz: int) -> None:
        """See `Mask.check`."""
        each = self.row_bytes.numpy()
        if (each < 0).any() or int(each.sum(dtype=np.int64)) != self.gaps.numel():
            raise LayoutError("the gaps of layout 'sparse' do not add up to their rows; the artifact is damaged.")
        check_count(nnz, int(np.count_nonzero(self.gaps.numpy() != ESCAPE)))
        ends = np.cumsum(each, dtype=np.int64)[each > 0] - 1
        if (self.gaps.numpy()[ends] == ESCAPE).any():
            raise LayoutError("a row of gaps of layout 'sparse' ends in an escape; the artifact is damaged.")
        step = max(1, _CHUNK * shape[0] // max(1, self.gaps.numel()))
        for start in range(0, shape[0], step):
            _, column, _ = self._walk(slice(start, min(start + step, shape[0])))
            if column.size and int(column.max()) >= shape[1]:
                raise LayoutError("the gaps of layout 'sparse' run past the end of a row; the artifact is damaged.")

    def _walk(self, rows: slice) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.bool_]]:
        """Row within the block and column that each byte of `rows` reaches, and whether it keeps the entry there."""
        each = self.row_bytes.numpy()
        start = int(each[: rows.start].sum(dtype=np.int64))
        mine = each[rows]
        steps = self.gaps.numpy()[start : start + int(mine.sum(dtype=np.int64))]
        keeps = steps != ESCAPE
        reached = np.cumsum(steps + keeps.astype(np.int64))
        row = np.repeat(np.arange(mine.size), mine)
        first = np.cumsum(mine, dtype=np.int64) - mine
        origin = np.concatenate(([0], reached))[first]
        return row, reached - origin[row] - 1, keeps
