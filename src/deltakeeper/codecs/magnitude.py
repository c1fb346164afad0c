"""Magnitude pruning of the delta: the entries that moved most, as they are.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626, applied to differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.largest import box_of_largest, kept_of, largest_of_rows, largest_of_tensor
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.masks import best_mask, expected_mask_bytes
from deltakeeper.layouts.settings import FLOAT_DTYPES
from deltakeeper.layouts.sparse import Sparse


@register_codec()
@dataclass(frozen=True)
class Magnitude(Codec):
    """The largest entries by magnitude, with a mask of bits or of gaps, whichever is smaller.

    Attributes:
        keep: share of the entries to keep, above 0 and at most 1, rounded up to whole entries. Exact zeros are never
            stored, and of equal entries at the threshold the first ones are kept.
        per: whether the share holds over the whole `tensor` or in each `row`.
        rescale: divide kept entries by `keep`; off, because it inflates the largest entries.
        values: dtype of the stored entries.
    """

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "Magnitude pruning"
    summary: ClassVar[str] = "the entries that changed most, with a mask"
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    keep: float = 0.1
    per: Literal["tensor", "row"] = "tensor"
    rescale: bool = False
    values: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "keep", 0, 1, above=True)

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return True

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; fewer where the delta has fewer entries that are not zero."""
        kept = kept_of(math.prod(shape), self.keep)
        if self.per == "row":
            kept = shape[0] * kept_of(shape[1], self.keep)
        return 4 + kept * FLOAT_DTYPES[self.values].itemsize + expected_mask_bytes(shape, kept)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term."""
        matrix = checked(delta, name)
        mask = self._mask(matrix)
        factor = 1.0 / self.keep if self.rescale else 1.0
        try:
            return [Sparse.from_matrix(matrix, best_mask(mask, matrix.shape[1]), self.values, factor=factor)]
        except LayoutError as error:
            raise CodecError(f"rescaling '{name}' by {factor:g} overflows float32; turn 'rescale' off.") from error

    def box(self, delta: torch.Tensor, *, name: str) -> Cells:
        """Kept entries stay as they are, dropped ones below the least of them."""
        matrix = checked(delta, name)
        kept = unpack_bits(self._mask(matrix), matrix.shape[1])
        wanted = kept_of(matrix.numel(), self.keep)
        if self.per == "row":
            wanted = kept_of(matrix.shape[1], self.keep)
        return box_of_largest(matrix, kept, wanted, by_row=self.per == "row")

    def _mask(self, matrix: torch.Tensor) -> torch.Tensor:
        largest = largest_of_tensor if self.per == "tensor" else largest_of_rows
        return largest(matrix.numpy(), self.keep)
