"""Masks that keep two entries of each four columns."""

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
from deltakeeper.layouts.codes import code_padding_is_clear, code_words, pack_codes, unpack_codes
from deltakeeper.layouts.masks.base import Mask, check_count


@dataclass(frozen=True, eq=False)
class TwoFourMask(Mask):
    """Two entries kept of each four columns (what sparse tensor cores multiply), two bits for each kept entry.

    A last group of fewer than four columns keeps up to two of them.

    Attributes:
        indices: int32 `(out, ceil(2 * kept / 32))`, per row an LSB-first stream of the kept entries' places in their
            groups, which ascend within each group.
    """

    kind: ClassVar[str] = "two_four"

    indices: torch.Tensor

    @staticmethod
    def kept_per_row(columns: int) -> int:
        """How many entries a row keeps."""
        return columns // 4 * 2 + min(2, columns % 4)

    @classmethod
    def from_words(cls, words: torch.Tensor, columns: int) -> Self:
        """The places of packed bits that keep two of each four columns.

        Raises:
            LayoutError: they keep another number somewhere.
        """
        out, kept = words.shape[0], cls.kept_per_row(columns)
        indices = torch.empty(out, code_words(kept, 2), dtype=torch.int32)
        for rows in row_blocks(out, columns):
            chosen = unpack_rows(byte_view(words)[rows], columns)
            groups = np.add.reduceat(chosen, np.arange(0, columns, 4), axis=1)
            if (groups != np.minimum(2, columns - np.arange(0, columns, 4))).any():
                raise LayoutError("a two_four mask keeps two of each four columns; store this mask as bits or gaps.")
            place = np.nonzero(chosen)[1].reshape(-1, kept) % 4
            indices[rows] = pack_codes(torch.from_numpy(place.astype(np.uint8)), 2)
        return cls(indices)

    def words(self, shape: tuple[int, int]) -> torch.Tensor:
        """The packed bits, block by block."""
        out, columns = shape
        words = zero_words(out, columns)
        for rows in row_blocks(out, columns):
            column = self._places(rows, columns) + np.arange(self.kept_per_row(columns)) // 2 * 4
            chosen = np.zeros((rows.stop - rows.start, columns), dtype=np.bool_)
            np.put_along_axis(chosen, column, True, axis=1)
            pack_rows(chosen, byte_view(words)[rows])
        return words

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_indices`."""
        return {"delta_indices": self.indices}

    def settings(self) -> Settings:
        """None."""
        return {}

    @classmethod
    def expect(cls, shape: tuple[int, int], nnz: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Mask.expect`."""
        kept = cls.kept_per_row(shape[1])
        check_count(nnz, shape[0] * kept)
        return {"delta_indices": TensorSpec(torch.int32, (shape[0], code_words(kept, 2)))}

    @classmethod
    def from_tensors(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See `Mask.from_tensors`."""
        return cls(tensors["delta_indices"])

    def check(self, shape: tuple[int, int], nnz: int) -> None:
        """See `Mask.check`."""
        out, columns = shape
        kept = self.kept_per_row(columns)
        if not code_padding_is_clear(self.indices, 2, kept):
            raise LayoutError(
                "payload 'delta_indices' of layout 'sparse' has padding bits set; the artifact is damaged."
            )
        group = np.arange(kept) // 2 * 4
        for rows in row_blocks(out, columns):
            place = self._places(rows, columns)
            falls = place[:, 1:] <= place[:, :-1]
            if falls[:, ::2].any() or (place + group >= columns).any():
                raise LayoutError(
                    "the places of a two_four mask of layout 'sparse' do not ascend within their groups or leave the "
                    "row; the artifact is damaged."
                )

    def _places(self, rows: slice, columns: int) -> NDArray[np.uint8]:
        places: NDArray[np.uint8] = unpack_codes(self.indices[rows], 2, self.kept_per_row(columns)).numpy()
        return places
