"""Reading a matrix through a packed mask, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.layouts.bits import byte_view, row_blocks, unpack_rows


def chosen_rows(words: torch.Tensor, columns: int) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """Blocks of rows and which of their entries a packed mask `(out, ceil(in/32))` keeps."""
    packed = byte_view(words)
    for rows in row_blocks(words.shape[0], columns):
        yield rows, unpack_rows(packed[rows], columns).view(np.bool_)


def gather(matrix: NDArray[Any], words: torch.Tensor) -> NDArray[Any]:
    """The entries of `matrix` at the set bits of a packed mask, in row-major order, as a new array."""
    return np.concatenate([matrix[rows][chosen] for rows, chosen in chosen_rows(words, matrix.shape[1])])
