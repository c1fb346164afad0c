"""Products with the `grouped_int` layout, codes cut into fields of 8, 4, 2 and 1 bits, which no word boundary cuts."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import (
    add_to_y,
    as_float,
    columns_of,
    expand,
    load_floats,
    load_words,
    load_x,
    multiply_add,
    rows_of,
)


@triton.jit
def load_codes(address, block, blocks, width, columns, bits):
    """The codes of the inputs `32 block ..` of some columns: int32 `(32, COLUMNS)`.

    The fields of w bits are int32 `(w * blocks, width)`, after those of all larger ones, which hold lower bits.
    """
    codes = tl.zeros((32, columns.shape[0]), dtype=tl.int32)
    step = width.to(tl.int64) * blocks * 4  # bytes of one bit of every code
    if bits == 8:
        codes = expand(load_words(address, block * 8, blocks * 8, width, columns, 8, 0), 8)
    if bits & 4:
        codes = expand(load_words(address, block * 4, blocks * 4, width, columns, 4, 0), 4)
    if bits & 2:
        above = bits & 4
        fields = load_words(address + above * step, block * 2, blocks * 2, width, columns, 2, 0)
        codes = codes | (expand(fields, 2) << above.to(tl.int32))
    if bits & 1:
        above = bits & 6
        fields = load_words(address + above * step, block, blocks, width, columns, 1, 0)
        codes = codes | (expand(fields, 1) << above.to(tl.int32))
    return codes


@triton.jit
def add_codes(
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
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces): y += Σ terms · x.

    ALIGNED: no block of 32 inputs has two groups. Then x meets the whole numbers, which every float dtype holds
    exactly, and the scale comes after; else the scaled weights are rounded as PRECISION says.
    """
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
    blocks = tl.cdiv(inputs, 32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        words, steps, zeros = tl.load(term), tl.load(term + 1), tl.load(term + 2)
        bits, group, kind = tl.load(term + 3), tl.load(term + 4), tl.load(term + 5)
        gain, middle, times = as_float(tl.load(term + 6)), tl.load(term + 7), tl.load(term + 8)
        part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for block in range(blocks):
            ks = block * 32 + tl.arange(0, 32)
            tile_x = load_x(x, x_stride, rows, row_ok, ks, inputs)
            codes = load_codes(words, block, blocks, width, columns, bits) * times.to(tl.int32)
            if ALIGNED:
                of_group = (block * 32 // group) * width + columns[None, :]
                here = column_ok[None, :]
            else:
                of_group = (ks // group)[:, None] * width + columns[None, :]
                here = (ks < inputs)[:, None] & column_ok[None, :]
            stored = (columns < tl.where(zeros != 0, width, 0))[None, :]
            zero = tl.load(zeros.to(tl.pointer_type(tl.uint8)) + of_group, mask=here & stored, other=0)
            numbers = codes - zero.to(tl.int32) - middle.to(tl.int32)
            step = load_floats(steps, of_group, here, kind)
            if ALIGNED:
                product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
                product = multiply_add(product, tile_x, numbers.to(tile_x.dtype), DOT, PRECISION)
                part += product * step
            else:
                part = multiply_add(part, tile_x.to(tl.float32), numbers.to(tl.float32) * step, DOT, PRECISION)
        total += part * gain
    add_to_y(y, y_stride, rows, row_ok, tl.load(tile + 3) + columns, column_ok, total)
