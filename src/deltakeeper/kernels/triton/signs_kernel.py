"""Products with the `signs` layout: woven words `[in/128, out, 4]`, expanded in the registers of the matrix units."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from deltakeeper.kernels.triton.tiles import LANES, columns_of, store_total

MASK = tl.constexpr(-0x7FFF8000)  # 0x80008000, the signs of two numbers of half precision


@triton.jit
def expand_signs(words, shifts, minus, dtype: tl.constexpr):
    """Woven words to ±1 of a dtype, exact: int32 `(n, 4)` to `(n, 128)`.

    A multiplication, which shifts, and a logical operation make two signs at once.
    """
    pairs = ((tl.reshape(words, (words.shape[0], 1, 4, 1)) * shifts) & MASK) ^ minus
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    signs = tl.reshape(halves, (words.shape[0], 128))
    if dtype == tl.bfloat16:
        signs = signs.to(tl.bfloat16, bitcast=True)
    else:
        signs = signs.to(tl.float16, bitcast=True).to(dtype)
    return signs


@triton.jit
def load_lanes(lanes):
    """A constant for each of the 16 pairs of a word. From memory: Triton keeps what it loads in registers, as they are.

    Where it made them itself (`tl.arange`) it would move all expanded signs through shared memory.
    """
    return tl.reshape(tl.load(lanes + tl.arange(0, LANES)), (1, 8, 1, 2))


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
    lanes,
    partial,
    split_stride,
    partial_stride,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, pieces, splits): y += Σ terms · x, or with SPLITS > 1 the sums of each split into `partial`.

    Tiles lie transposed, outputs by rows: a few rows are then the narrow side of the matrix units, and the expanded
    signs the side that may come from registers. EVEN: the inputs are whole blocks of 128; SCALED: some term
    has a scale for each input.
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
    blocks = tl.cdiv(inputs, 128)
    share = tl.cdiv(blocks, SPLITS)
    low = tl.program_id(2) * share
    shifts, minus = load_lanes(lanes), load_lanes(lanes + LANES)
    of_column = tl.minimum(columns, width - 1)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x += first_row * x_stride
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for index in range(terms):
        term = fields + (at * depth + index) * FIELDS
        factors, factor_stride, scales = tl.load(term + 1), tl.load(term + 2), tl.load(term + 3)
        planes, plane_bytes = tl.load(term + 4), tl.load(term + 5)
        for plane in range(planes):
            words = tl.multiple_of((tl.load(term) + plane * plane_bytes).to(tl.pointer_type(tl.int32)), 16)
            part = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for block in range(low, tl.minimum(low + share, blocks)):
                ks = block * 128 + tl.arange(0, 128)
                here = row_ok[None, :]
                if not EVEN:  # past the last input x is zero, whatever the words are
                    here = here & (ks < inputs)[:, None]
                packed = tl.load(words + block * width * 4 + of_column)
                tile_x = tl.load(x + rows[None, :] * x_stride + ks[:, None], mask=here, other=0.0)
                if SCALED:  # at most 1, so that half precision cannot overflow
                    scale = scales.to(tl.pointer_type(tl.float32)) + plane * inputs + ks
                    scale = tl.load(scale, mask=ks < tl.where(scales != 0, inputs, 0), other=1.0)
                    tile_x = (tile_x.to(tl.float32) * scale[:, None]).to(tile_x.dtype)
                signs = expand_signs(packed, shifts, minus, tile_x.dtype)
                part = tl.dot(signs, tile_x, part, input_precision=PRECISION)
            of_plane = plane * tl.where(factor_stride == 0, 1, width) + columns * factor_stride
            factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + of_plane, mask=column_ok, other=0.0)
            total += part * factor[:, None]
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
