"""Products with float matrices: the `dense` layout, and the two halves of `lowrank`, shrink and expand."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import add_to_y, as_float, columns_of, load_floats, load_x, multiply_add, rows_of


@triton.jit
def rows_product(
    x,
    x_stride,
    rows,
    row_ok,
    inputs,
    low,
    high,
    address,
    kind,
    columns,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x @ matrixᵀ` over the inputs `low .. high - 1`, matrix `(width, inputs)`: float32 `(ROWS, COLUMNS)`."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(low, high, STEP):
        ks = first + tl.arange(0, STEP)
        tile = load_x(x, x_stride, rows, row_ok, ks, inputs).to(tl.float32)
        offsets = columns[None, :].to(tl.int64) * inputs + ks[:, None]
        weights = load_floats(address, offsets, (ks < inputs)[:, None] & (columns < width)[None, :], kind)
        total = multiply_add(total, tile, weights, DOT, PRECISION)
    return total


@triton.jit
def add_floats(
    y,
    y_stride,
    x,
    x_stride,
    inputs,
    pieces,
    tiles,
    counts,
    fields,
    projections,
    depth,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces): y += Σ terms · x of dense terms."""
    piece = pieces + tl.program_id(1) * 3
    slot = tl.load(piece)
    if slot <= 0:
        return
    tile = tiles + tl.program_id(0) * 4
    at = slot * projections + tl.load(tile)
    terms = tl.load(counts + at)
    if terms == 0:
        return
    rows, row_ok = rows_of(piece, ROWS)
    columns, width = columns_of(tile, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        total += rows_product(
            x,
            x_stride,
            rows,
            row_ok,
            inputs,
            0,
            inputs,
            tl.load(term),
            tl.load(term + 1),
            columns,
            width,
            ROWS,
            COLUMNS,
            STEP,
            DOT,
            PRECISION,
        )
    add_to_y(y, y_stride, rows, row_ok, tl.load(tile + 3) + columns, columns < width, total)


@triton.jit
def shrink(
    partial,
    split_stride,
    partial_stride,
    x,
    x_stride,
    inputs,
    pieces,
    counts,
    fields,
    projections,
    depth,
    ranks,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (projections * depth * rank tiles, pieces, splits): x · Vᵀ of every term, float32 into `partial`.

    `partial` is (splits, rows, projections * depth * ranks). With few ranks only splits along the input fill a GPU.
    """
    piece = pieces + tl.program_id(1) * 3
    slot = tl.load(piece)
    if slot <= 0:
        return
    rank_tiles = tl.cdiv(ranks, RANKS)
    place = tl.program_id(0) // rank_tiles  # projection * depth + index
    at = slot * projections + place // depth
    if place % depth >= tl.load(counts + at):
        return
    term = fields + (at * depth + place % depth) * FIELDS
    rank = tl.load(term + 3).to(tl.int32)
    columns = tl.program_id(0) % rank_tiles * RANKS + tl.arange(0, RANKS)
    rows, row_ok = rows_of(piece, ROWS)
    share = tl.cdiv(tl.cdiv(inputs, STEP), SPLITS) * STEP
    low = tl.program_id(2) * share
    total = rows_product(
        x,
        x_stride,
        rows,
        row_ok,
        inputs,
        low,
        tl.minimum(low + share, inputs),
        tl.load(term),
        tl.load(term + 2),
        columns,
        rank,
        ROWS,
        RANKS,
        STEP,
        DOT,
        PRECISION,
    )
    into = partial + tl.program_id(2) * split_stride + rows[:, None] * partial_stride + place * ranks + columns[None, :]
    tl.store(into, total, mask=row_ok[:, None] & (columns < rank)[None, :])


@triton.jit
def expand_ranks(
    y,
    y_stride,
    partial,
    split_stride,
    partial_stride,
    pieces,
    tiles,
    counts,
    fields,
    projections,
    depth,
    ranks,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces): y += gain · (x · Vᵀ) · Uᵀ, the splits added up in their order as they are read."""
    piece = pieces + tl.program_id(1) * 3
    slot = tl.load(piece)
    if slot <= 0:
        return
    tile = tiles + tl.program_id(0) * 4
    projection = tl.load(tile)
    at = slot * projections + projection
    terms = tl.load(counts + at)
    if terms == 0:
        return
    rows, row_ok = rows_of(piece, ROWS)
    columns, width = columns_of(tile, COLUMNS)
    column_ok = columns < width
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        address, kind, rank = tl.load(term + 1), tl.load(term + 2), tl.load(term + 3).to(tl.int32)
        part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, rank, RANKS):
            at_ranks = first + tl.arange(0, RANKS)
            rank_ok = at_ranks < rank
            thin = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for split in range(SPLITS):
                place = (projection * depth + index) * ranks + at_ranks
                where = partial + split * split_stride + rows[:, None] * partial_stride + place[None, :]
                thin += tl.load(where, mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
            offsets = at_ranks[:, None].to(tl.int64) * width + columns[None, :]
            factor = load_floats(address, offsets, rank_ok[:, None] & column_ok[None, :], kind)
            part = multiply_add(part, thin, factor, DOT, PRECISION)
        total += part * as_float(tl.load(term + 4))
    add_to_y(y, y_stride, rows, row_ok, tl.load(tile + 3) + columns, column_ok, total)
