"""What the kernels share: reading a piece and a tile, loading floats, adding to `y`.

These are functions of the Triton language, not of Python: they are compiled, or run by Triton's interpreter.
"""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

FLOAT16 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
LANES = tl.constexpr(16)  # pairs of one thread in a block of 128 inputs


@triton.jit
def load_floats(address, offsets, mask, kind):
    """Entries of a float16, bfloat16 or float32 array at an address, as float32."""
    if kind == FLOAT16:
        found = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    elif kind == BFLOAT16:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    return found


@triton.jit
def as_float(bits):
    """A float32 whose bits are stored in an int64 field."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rows_of(piece, ROWS: tl.constexpr):
    """Rows of a piece `(slot, first row, rows)`, and which of them are its own: `(ROWS,)` each."""
    at = tl.arange(0, ROWS)
    return tl.load(piece + 1) + at, at < tl.load(piece + 2)


@triton.jit
def columns_of(tile, COLUMNS: tl.constexpr):
    """Outputs of a tile `(projection, first output, outputs of the projection, where they begin in y)`, all outputs."""
    return tl.load(tile + 1) + tl.arange(0, COLUMNS), tl.load(tile + 2)


@triton.jit
def load_x(x, stride, rows, row_ok, ks, inputs):
    """`(ROWS, k)` of x; zero past the last input, so that what the weights hold there does not count."""
    return tl.load(x + rows[:, None] * stride + ks[None, :], mask=row_ok[:, None] & (ks < inputs)[None, :], other=0.0)


@triton.jit
def multiply_add(total, x, weights, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`total + x @ weights` in float32: `(m, k)` and `(k, n)`; without DOT on the ordinary cores, for a few rows."""
    if DOT:
        total = tl.dot(x, weights, total, input_precision=PRECISION)
    else:
        total += tl.sum(x.to(tl.float32)[:, :, None] * weights.to(tl.float32)[None, :, :], axis=1)
    return total


@triton.jit
def add_to_y(y, stride, rows, row_ok, columns, column_ok, total):
    """Add a float32 tile to y in place, rounded once."""
    at = y + rows[:, None] * stride + columns[None, :]
    here = row_ok[:, None] & column_ok[None, :]
    old = tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, (old + total).to(y.dtype.element_ty), mask=here)


@triton.jit
def store_total(
    y,
    y_stride,
    partial,
    split_stride,
    partial_stride,
    first_row,
    rows,
    row_ok,
    columns,
    column_ok,
    total,
    SPLITS: tl.constexpr,
):
    """Add a tile `(columns, rows)` to y, rounded once; with several splits keep it apart, for `add_partials`."""
    here = column_ok[:, None] & row_ok[None, :]
    if SPLITS == 1:
        place = y + first_row * y_stride + rows[None, :] * y_stride + columns[:, None]
        old = tl.load(place, mask=here, other=0.0).to(tl.float32)
        tl.store(place, (old + total).to(y.dtype.element_ty), mask=here)
    else:
        place = partial + tl.program_id(2) * split_stride + first_row * partial_stride
        tl.store(place + rows[None, :] * partial_stride + columns[:, None], total, mask=here)
