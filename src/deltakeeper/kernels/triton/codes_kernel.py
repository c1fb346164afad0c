"""Products with the `grouped_int` layout: woven words `[in/128, out, 4 * bits]`, expanded in registers as signs are.

A code is cut into fields of 8, 4, 2 and 1 bits, which no word boundary cuts.
"""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import LANES, as_float, columns_of, load_floats, store_total


@triton.jit
def add_field(pairs, words, shifts, BELOW: tl.constexpr, WIDTH: tl.constexpr):
    """`pairs` with a field of WIDTH bits above the BELOW lowest: int32 `(n, 8, 4, 2)`, two codes in each."""
    SLOTS: tl.constexpr = 16 // WIDTH
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    shift = tl.reshape(tl.load(shifts + tl.arange(0, SLOTS) * WIDTH), (1, 1, SLOTS, 1))
    found = (tl.reshape(words, (words.shape[0], WIDTH, 1, 4)) >> shift) & MASK
    found = tl.permute(tl.reshape(found, (words.shape[0], 8, 2, 4)), (0, 1, 3, 2))
    return pairs | (found << BELOW)


@triton.jit
def load_field(words, of_column, BITS: tl.constexpr, ABOVE: tl.constexpr, WIDTH: tl.constexpr):
    """The words of one field of a block, after those of all larger fields: int32 `(n, 4 * WIDTH)`."""
    return tl.load(words + of_column[:, None] * (4 * BITS) + (4 * ABOVE + tl.arange(0, 4 * WIDTH))[None, :])


@triton.jit
def load_codes(words, of_column, shifts, BITS: tl.constexpr):
    """The codes of one block, two in each int32 `(n, 8, 4, 2)`."""
    pairs = tl.full((of_column.shape[0], 8, 4, 2), 0, dtype=tl.int32)
    if BITS == 8:
        pairs = add_field(pairs, load_field(words, of_column, BITS, 0, 8), shifts, 0, 8)
    if BITS & 4:
        pairs = add_field(pairs, load_field(words, of_column, BITS, 0, 4), shifts, 0, 4)
    if BITS & 2:
        pairs = add_field(pairs, load_field(words, of_column, BITS, BITS & 4, 2), shifts, BITS & 4, 2)
    if BITS & 1:
        pairs = add_field(pairs, load_field(words, of_column, BITS, BITS & 6, 1), shifts, BITS & 6, 1)
    return pairs


@triton.jit
def join_halves(pairs):
    """`(n, 8, 4, 2)` pairs to int16 `(n, 128)`, in the order of the inputs."""
    return tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), (pairs.shape[0], 128))


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
    lanes,
    partial,
    split_stride,
    partial_stride,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces, splits): as `add_signs`, of terms of BITS bits.

    PLAIN: no block of 128 inputs has two groups. Then x meets whole numbers, which every float dtype holds exactly, and
    step and zero point come after, with the sum of x; else the scaled weights are rounded as PRECISION says. EVEN: the
    inputs are whole blocks.
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
    first_row, rows = tl.load(piece + 1), tl.arange(0, ROWS)
    row_ok = rows < tl.load(piece + 2)
    columns, width = columns_of(tile, COLUMNS)
    column_ok = columns < width
    of_column = tl.minimum(columns, width - 1)
    x += first_row * x_stride
    blocks = tl.cdiv(inputs, 128)
    share = tl.cdiv(blocks, SPLITS)
    low = tl.program_id(2) * share
    shifts = lanes + 2 * LANES
    dtype: tl.constexpr = x.dtype.element_ty
    # a short code lies in the highest bits of a fraction: 1 + code / 2^BITS, made without a conversion
    FRACTION: tl.constexpr = PLAIN and BITS < 8 and dtype != tl.float32
    GAIN: tl.constexpr = 1 << BITS if FRACTION else 1
    ones = tl.full((COLUMNS, 128), 1, dtype)
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        bits, group, kind = tl.load(term + 3), tl.load(term + 4), tl.load(term + 5)
        if bits == BITS:
            words = tl.multiple_of(tl.load(term).to(tl.pointer_type(tl.int32)), 16)
            steps, zeros = tl.load(term + 1), tl.load(term + 2)
            middle, times = tl.load(term + 7).to(tl.float32), tl.load(term + 8).to(tl.float32)
            part = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for block in range(low, tl.minimum(low + share, blocks)):
                ks = block * 128 + tl.arange(0, 128)
                here = row_ok[None, :]
                if not EVEN:
                    here = here & (ks < inputs)[:, None]
                tile_x = tl.load(x + rows[None, :] * x_stride + ks[:, None], mask=here, other=0.0)
                pairs = load_codes(words + tl.cast(block, tl.int64) * width * (4 * BITS), of_column, shifts, BITS)
                if PLAIN:
                    of_group = (block * 128 // group) * width + of_column
                    stored = columns < tl.where(zeros != 0, width, 0)
                else:
                    of_group = (tl.minimum(ks, inputs - 1) // group)[None, :] * width + of_column[:, None]
                    stored = (columns < tl.where(zeros != 0, width, 0))[:, None]
                zero = tl.load(zeros.to(tl.pointer_type(tl.uint8)) + of_group, mask=stored, other=0)
                step = load_floats(steps, of_group, of_group >= 0, kind)
                zero = zero.to(tl.float32) + middle
                if FRACTION:
                    SHIFT: tl.constexpr = (7 if dtype == tl.bfloat16 else 10) - BITS
                    ONE: tl.constexpr = 0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00
                    numbers = join_halves(pairs * (1 << SHIFT) + ONE).to(dtype, bitcast=True)
                else:
                    numbers = join_halves(pairs).to(tl.float32)
                if PLAIN:
                    none = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
                    product = tl.dot(numbers.to(dtype), tile_x, none, input_precision=PRECISION)
                    sums = tl.dot(ones, tile_x, none, input_precision=PRECISION)
                    offset = zero + (times * GAIN if FRACTION else 0.0)
                    part += (product * (times * GAIN) - sums * offset[:, None]) * step[:, None]
                else:
                    weights = (numbers * times - zero) * step
                    part = tl.dot(weights, tile_x.to(tl.float32), part, input_precision=PRECISION)
            total += part * as_float(tl.load(term + 6))
    store_total(
        y,
        y_stride,
        partial,
        split_stride,
        partial_stride,
        first_row,
        rows,
        row_ok,
        tl.load(tile + 3) + columns,
        column_ok,
        total,
        SPLITS,
    )
