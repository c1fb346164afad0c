"""Products with the `signs` layout: words `[in/32, out]`, each loaded once and expanded by shift and mask."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import add_to_y, columns_of, expand, load_words, load_x, rows_of


@triton.jit
def one_plane(
    x,
    x_stride,
    rows,
    row_ok,
    columns,
    width,
    inputs,
    low,
    high,
    words,
    nonzero,
    scales,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x @ signsᵀ` of one plane over the words `low .. high - 1`, float32 `(ROWS, COLUMNS)`.

    `nonzero` and `scales` (per input) may be 0: a load that is masked off then gives all ones, which costs no branch.
    """
    count = tl.cdiv(inputs, 32)
    scaled = tl.where(scales != 0, inputs, 0)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(low, high, WORDS):
        ks = first * 32 + tl.arange(0, WORDS * 32)
        tile = load_x(x, x_stride, rows, row_ok, ks, inputs)
        # scales are at most 1, so that half precision cannot overflow
        scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + ks, mask=ks < scaled, other=1.0)
        tile = (tile.to(tl.float32) * scale[None, :]).to(tile.dtype)
        plus = expand(load_words(words, first, count, width, columns, WORDS, 0), 1)
        kept = expand(load_words(nonzero, first, count, width, columns, WORDS, -1), 1)
        if DOT:
            signs = ((plus * 2 - 1) * kept).to(tile.dtype)  # exact: -1, 0 or 1
            total = tl.dot(tile, signs, total, input_precision=PRECISION)
        else:
            wide = tile.to(tl.float32)[:, :, None]
            chosen = tl.where(plus[None, :, :] != 0, wide, -wide)
            total += tl.sum(tl.where(kept[None, :, :] != 0, chosen, 0.0), axis=1)
    return total


@triton.jit
def add_signs(
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
    partial,
    split_stride,
    partial_stride,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces, splits): y += Σ terms · x, or with SPLITS > 1 the sums of each split into `partial`."""
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
    column_ok = columns < width
    words = tl.cdiv(inputs, 32)
    share = tl.cdiv(tl.cdiv(words, WORDS), SPLITS) * WORDS
    low = tl.program_id(2) * share
    high = tl.minimum(low + share, words)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        factors, factor_stride = tl.load(term + 2), tl.load(term + 3)
        scales = tl.load(term + 4)
        planes, plane_bytes = tl.load(term + 5), tl.load(term + 6)
        for plane in range(planes):
            part = one_plane(
                x,
                x_stride,
                rows,
                row_ok,
                columns,
                width,
                inputs,
                low,
                high,
                tl.load(term) + plane * plane_bytes,
                tl.load(term + 1),
                tl.where(scales == 0, scales, scales + plane * inputs * 4),
                ROWS,
                COLUMNS,
                WORDS,
                DOT,
                PRECISION,
            )
            of_plane = plane * tl.where(factor_stride == 0, 1, width) + columns * factor_stride
            factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + of_plane, mask=column_ok, other=0.0)
            total += part * factor[None, :]
    into = tl.load(tile + 3) + columns
    if SPLITS == 1:
        add_to_y(y, y_stride, rows, row_ok, into, column_ok, total)
    else:
        place = partial + tl.program_id(2) * split_stride + rows[:, None] * partial_stride + into[None, :]
        tl.store(place, total, mask=row_ok[:, None] & column_ok[None, :])


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
