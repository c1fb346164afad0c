"""Products with the `sparse` layout: mask words `[in/32, out]`, the start of each row's values, and the values."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import add_to_y, columns_of, load_floats, load_x, multiply_add, rows_of

CODES = tl.constexpr(3)


@triton.jit
def load_values(address, positions, mask, kind, bits, times, zero):
    """Values at some positions of the packed run, before their gain: float32, zero where masked off."""
    if kind == CODES:
        first = positions.to(tl.int64) * bits
        shift = (first & 31).to(tl.uint32)
        words = address.to(tl.pointer_type(tl.uint32)) + (first >> 5)
        low = tl.load(words, mask=mask, other=0) >> shift
        cut = shift + bits.to(tl.uint32) > 32  # the code goes on in the next word
        high = tl.load(words + 1, mask=mask & cut, other=0) << ((32 - shift) & 31)
        codes = (low | high) & ((1 << bits) - 1).to(tl.uint32)
        found = tl.where(mask, (codes.to(tl.int32) * times.to(tl.int32) - zero.to(tl.int32)).to(tl.float32), 0.0)
    else:
        found = load_floats(address, positions, mask, kind)
    return found


@triton.jit
def add_sparse(
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
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces): y += Σ terms · x. Every program walks along rows of the term and counts what is kept."""
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
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        mask, starts, values, kind = tl.load(term), tl.load(term + 1), tl.load(term + 2), tl.load(term + 3)
        factors, factor_stride = tl.load(term + 4), tl.load(term + 5)
        bits, zero, times = tl.load(term + 6), tl.load(term + 7), tl.load(term + 8)
        passed = tl.load(starts.to(tl.pointer_type(tl.int32)) + columns, mask=column_ok, other=0)
        part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for block in range(tl.cdiv(inputs, 32)):
            ks = block * 32 + tl.arange(0, 32)
            tile_x = load_x(x, x_stride, rows, row_ok, ks, inputs)
            place = mask.to(tl.pointer_type(tl.int32)) + tl.cast(block, tl.int64) * width + columns
            word = tl.load(place, mask=column_ok, other=0)
            kept = (word[None, :] >> tl.arange(0, 32)[:, None]) & 1
            positions = passed[None, :] + tl.cumsum(kept, axis=0) - kept
            weights = load_values(values, positions, kept != 0, kind, bits, times, zero)
            part = multiply_add(part, tile_x.to(tl.float32), weights, DOT, PRECISION)
            passed += tl.sum(kept, axis=0)
        where = factors.to(tl.pointer_type(tl.float32)) + columns * factor_stride
        total += part * tl.load(where, mask=column_ok, other=0.0)[None, :]
    add_to_y(y, y_stride, rows, row_ok, tl.load(tile + 3) + columns, column_ok, total)
