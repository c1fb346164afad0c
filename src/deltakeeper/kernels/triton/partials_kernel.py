"""Adds up what programs that share a tile's inputs have found."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import add_to_y, rows_of


@triton.jit
def add_partials(
    y,
    y_stride,
    pieces,
    tiles,
    counts,
    projections,
    partial,
    split_stride,
    partial_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (tiles, pieces): add up the splits in their order, so that every run gives the same bits."""
    piece = pieces + tl.program_id(1) * 3
    slot = tl.load(piece)
    if slot <= 0:
        return
    tile = tiles + tl.program_id(0) * 4
    if tl.load(counts + slot * projections + tl.load(tile)) == 0:
        return
    rows, row_ok = rows_of(piece, ROWS)
    columns = tl.load(tile + 1) + tl.arange(0, COLUMNS)
    column_ok = columns < tl.load(tile + 2)
    into = tl.load(tile + 3) + columns
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in range(SPLITS):
        place = partial + split * split_stride + rows[:, None] * partial_stride + into[None, :]
        total += tl.load(place, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    add_to_y(y, y_stride, rows, row_ok, into, column_ok, total)
