"""Sign planes of blocks of rows: subtract, take the sign, pack and sum in one pass, and the way back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.native.library import load_library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that the passes read and write."""

AXES = {"tensor": 0, "row": 1, "column": 2}
_LANES = 16


@dataclass(frozen=True)
class SignRows:
    """What `pack_signs` tells of a block of rows.

    Attributes:
        words: sign bits, int32 `(rows, ceil(columns/32))`; a zero is plus, or minus if asked for.
        present: bits of the non-zeros, int32 like `words`.
        absolute: sum of `|d|` per row, float64 `(rows,)`; NaN or infinity if an entry is.
        square: sum of `d²` per row, float64 `(rows,)`.
        nonzero: non-zeros per row, int64 `(rows,)`.
    """

    words: torch.Tensor
    present: torch.Tensor
    absolute: NDArray[np.float64]
    square: NDArray[np.float64]
    nonzero: NDArray[np.int64]

    @classmethod
    def empty(cls, rows: int, columns: int) -> SignRows:
        """Room for a matrix of this shape, not yet written."""
        words, present = (torch.empty(rows, -(-columns // 32), dtype=torch.int32) for _ in range(2))
        return cls(words, present, np.empty(rows), np.empty(rows), np.empty(rows, dtype=np.int64))

    def __getitem__(self, rows: slice) -> SignRows:
        """The same memory for some of the rows."""
        return SignRows(
            self.words[rows], self.present[rows], self.absolute[rows], self.square[rows], self.nonzero[rows]
        )


def pack_signs(
    tuned: torch.Tensor,
    base: torch.Tensor | None = None,
    *,
    minus: bool = False,
    into: SignRows | None = None,
    version: str = "best",
) -> SignRows:
    """Signs of `tuned - base` in float32, packed, with sums per row.

    Args:
        tuned: `(rows, columns)`, float32, float16 or bfloat16, contiguous.
        base: the same shape, of any of these dtypes; None stands for zero.
        minus: whether a zero gets the sign minus.
        into: where to write; new memory by default.
        version: `best`, or `scalar` and `numpy` for tests; all give the same bits.
    """
    rows, columns = tuned.shape
    found = SignRows.empty(rows, columns) if into is None else into
    library = None if version == "numpy" else load_library()
    if library is None:
        return _pack_with_numpy(tuned, base, minus, found)
    library.deltakeeper_pack_signs(
        None if base is None else base.data_ptr(),
        0 if base is None else KINDS[base.dtype],
        tuned.data_ptr(),
        KINDS[tuned.dtype],
        rows,
        columns,
        int(minus),
        found.words.data_ptr(),
        found.present.data_ptr(),
        found.absolute.ctypes.data,
        found.square.ctypes.data,
        found.nonzero.ctypes.data,
        int(version == "scalar"),
    )
    return found


def merge_signs(
    words: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    axis: str,
    present: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
    *,
    version: str = "best",
) -> bool:
    """Write `base + sum of planes` into `out`: planes are summed in float32 in their order, and rounded once.

    Args:
        words: per plane sign bits, int32 `(rows, ceil(columns/32))`.
        scales: per plane float32: one value, one a row, or one a column, as `axis` says (`tensor`, `row`, `column`).
        axis: what the scales belong to.
        present: bits of the entries that are not zero; None for all.
        base: `(rows, columns)`, or None for zero.
        out: `(rows, columns)` float32, float16 or bfloat16, overwritten.
        version: `best`, or `scalar` for tests.

    Returns:
        False where the compiled library is absent, and nothing was written.
    """
    library = load_library()
    if library is None:
        return False
    rows, columns = out.shape
    library.deltakeeper_merge_signs(
        len(words),
        _pointers(words),
        _pointers(scales),
        None if present is None else present.data_ptr(),
        AXES[axis],
        None if base is None else base.data_ptr(),
        0 if base is None else KINDS[base.dtype],
        rows,
        columns,
        out.data_ptr(),
        KINDS[out.dtype],
        int(version == "scalar"),
    )
    return True


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _pack_with_numpy(tuned: torch.Tensor, base: torch.Tensor | None, minus: bool, into: SignRows) -> SignRows:
    rows, columns = tuned.shape
    d = tuned.to(torch.float32, copy=True)
    if base is not None:
        d -= base
    values: NDArray[np.float32] = d.numpy()
    signs, there = values > 0 if minus else values >= 0, values != 0
    for bits, words in ((signs, into.words), (there, into.present)):
        packed = np.zeros((rows, 4 * words.shape[1]), dtype=np.uint8)
        packed[:, : -(-columns // 8)] = np.packbits(bits, axis=1, bitorder="little")
        words.numpy()[:] = packed.view(np.int32)
    into.nonzero[:] = np.count_nonzero(there, axis=1)
    padded = np.zeros((rows, -(-columns // _LANES) * _LANES))
    padded[:, :columns] = np.abs(values)
    with np.errstate(invalid="ignore", over="ignore"):
        for target, entries in ((into.absolute, padded), (into.square, padded * padded)):
            lanes = np.add.reduce(entries.reshape(rows, -1, _LANES), axis=1)  # in order: the axis is not the last
            for width in (8, 4, 2, 1):
                lanes = lanes[:, :width] + lanes[:, width : 2 * width]
            target[:] = lanes[:, 0]
    return into
