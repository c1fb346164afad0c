"""Magnitude pruning of the delta: the entries that moved most, as they are.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626, applied to differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words
from deltakeeper.layouts.sparse import Sparse


@register_codec()
@dataclass(frozen=True)
class Magnitude(Codec):
    """The largest entries by magnitude, with a bit mask.

    Attributes:
        keep: share of the entries to keep, above 0 and at most 1, rounded up to whole entries. Exact zeros are never
            stored, and of equal entries at the threshold the first ones are kept.
        per: whether the share holds over the whole `tensor` or in each `row`.
        rescale: divide kept entries by `keep`; off, because it inflates the largest entries.
        values: dtype of the stored entries.
    """

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "Magnitude pruning"
    summary: ClassVar[str] = "the entries that changed most, with a bit mask"
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    keep: float = 0.1
    per: Literal["tensor", "row"] = "tensor"
    rescale: bool = False
    values: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "keep", 0, 1, above=True)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term."""
        matrix = checked(delta, name)
        if self.per == "tensor":
            mask = _largest_of_tensor(matrix.numpy(), self.keep)
        else:
            mask = _largest_of_rows(matrix.numpy(), self.keep)
        factor = 1.0 / self.keep if self.rescale else 1.0
        try:
            return [Sparse.from_matrix(matrix, mask, self.values, factor=factor)]
        except LayoutError as error:
            raise CodecError(f"rescaling '{name}' by {factor:g} overflows float32; turn 'rescale' off.") from error


def _largest_of_tensor(values: NDArray[np.float32], keep: float) -> torch.Tensor:
    """Packed mask of the `ceil(keep * entries)` largest magnitudes; needs one float32 copy."""
    out, columns = values.shape
    magnitudes = np.abs(values).reshape(-1)
    count = math.ceil(keep * magnitudes.size)
    magnitudes.partition(magnitudes.size - count)
    threshold = magnitudes[magnitudes.size - count]
    ties = count - int(np.count_nonzero(magnitudes > threshold))
    del magnitudes
    mask = zero_words(out, columns)
    for rows in row_blocks(out, columns):
        block = np.abs(values[rows])
        chosen = block > threshold
        if ties and threshold > 0:
            first = np.flatnonzero(block == threshold)[:ties]
            chosen.reshape(-1)[first] = True
            ties -= first.size
        pack_rows(chosen, byte_view(mask)[rows])
    return mask


def _largest_of_rows(values: NDArray[np.float32], keep: float) -> torch.Tensor:
    """Packed mask of the `ceil(keep * in)` largest magnitudes of each row."""
    out, columns = values.shape
    count = math.ceil(keep * columns)
    mask = zero_words(out, columns)
    for rows in row_blocks(out, columns):
        block = np.abs(values[rows])
        threshold = np.partition(block, columns - count, axis=1)[:, columns - count, None]
        above, tied = block > threshold, block == threshold
        ties = count - np.count_nonzero(above, axis=1, keepdims=True)
        chosen = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= ties))
        pack_rows(chosen & (block > 0), byte_view(mask)[rows])
    return mask
