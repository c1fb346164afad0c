"""Triton's kernels against `Layout.to_dense` in float64; test_triton.py runs this interpreted, in a process of its own.

`TRITON_INTERPRET=0 pytest tests/kernels/triton_products.py` runs it on a GPU, and then in bfloat16 too.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import KernelError
from deltakeeper.kernels import triton
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.triton import Blocks, RowPieces, TermTable, pack
from deltakeeper.layouts import Dense, GroupedInt, Lowrank, Signs, Sparse
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.signs import scale_shape

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DOT = Blocks(rows=16, columns=16, words=1, ranks=16, splits=1)
SPLIT = Blocks(rows=16, columns=32, words=2, ranks=16, splits=2)
SELECT = Blocks(rows=2, columns=16, words=1, ranks=4, dot=False, splits=1)
# of the sum of magnitudes; float16: y is rounded once for each layout and x * scale once (2^-11 each)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.1e-3}
if not INTERPRETED:  # the interpreter multiplies bfloat16 wrongly
    TOLERANCE[torch.bfloat16] = 8.8e-3


def add_terms_(y, x, table, groups):
    """`triton.add_terms_` on matrices that are made here, wherever the kernels run."""
    on = y if y.device.type == DEVICE else moved(y)
    triton.add_terms_(on, x if x.device.type == DEVICE else moved(x), table, groups)
    y.copy_(on)


def moved(matrix):
    """A copy on the device with the same strides."""
    whole = matrix if matrix._base is None else matrix._base
    return whole.to(DEVICE).as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())


def random(*shape):
    return torch.randn(*shape, dtype=torch.float32)


def signs(out, columns, planes=1, scale="tensor", zeros=False):
    nonzero = torch.rand(out, columns) < 0.7
    bits = [pack_bits((torch.rand(out, columns) < 0.5) & (nonzero | (not zeros))) for _ in range(planes)]
    scales = [random(*scale_shape((out, columns), scale)) * 1e-3 for _ in range(planes)]
    tensors = {f"delta_packed.{k}": words for k, words in enumerate(bits)}
    tensors |= {f"delta_scale.{k}": one for k, one in enumerate(scales)}
    tensors |= {"delta_nonzero": pack_bits(nonzero)} if zeros else {}
    chosen = {"planes": planes, "scale": scale, "zero": "zero" if zeros else "minus"}
    return Signs.from_tensors((out, columns), chosen, tensors)


def grouped(out, columns, bits=4, group=32, symmetric=True, scale="float16"):
    return GroupedInt.from_matrix(random(out, columns) * 1e-6, bits, group, symmetric=symmetric, scale_dtype=scale)


def sparse(out, columns, values="float16", density=0.3):
    mask = pack_bits(torch.rand(out, columns) < density)
    if values == "sign":
        return Sparse.from_signs(random(out, columns), mask, 3e-4)
    if isinstance(values, int):
        codes = torch.randint(0, 2**values, (out, columns), dtype=torch.int16)
        return Sparse.from_codes(codes, random(out, 1), mask, bits=values, zero_point=2 ** (values - 1) - 1)
    return Sparse.from_matrix(random(out, columns) * 1e-6, mask, values)


def lowrank(out, columns, rank=3, factors="float16"):
    return Lowrank.from_factors(random(out, rank) * 1e-3, random(rank, columns) * 1e-3, factors)


def table_of(places, widths, inputs, slots=4, depth=2):
    table = TermTable(widths, inputs, slots, depth=depth, device=DEVICE)
    for (slot, projection), terms in places.items():
        table.put(slot, projection, [pack(term, DEVICE) for term in terms])
    return table


def check(places, widths, inputs, row_slots, blocks=DOT, dtype=torch.float32):
    """Rows of tenants lie within the tolerance of the sum of magnitudes; every other row keeps its bits."""
    x = random(len(row_slots), inputs).to(dtype)
    expected, bound = torch.zeros(2, len(row_slots), sum(widths), dtype=torch.float64)
    for (slot, projection), terms in places.items():
        span = slice(sum(widths[:projection]), sum(widths[: projection + 1]))
        rows = [row for row, of in enumerate(row_slots) if of == slot]
        for dense in [term.to_dense().double() for term in terms]:
            expected[rows, span] += x[rows].double() @ dense.T
            bound[rows, span] += x[rows].double().abs() @ dense.abs().T
    before = (torch.randn(expected.shape) * bound.max()).to(dtype)  # of a size at which the terms show
    y = before.clone()
    table = table_of(places, widths, inputs)
    add_terms_(y, x, table, RowPieces.of(RowGroups.of(row_slots), DEVICE, blocks=blocks))
    size = bound + before.double().abs() * len(table.launches)
    least = 2.0**-24 if dtype == torch.float16 else 0.0  # the smallest step of y
    assert bool(((y.double() - before.double() - expected).abs() <= TOLERANCE[dtype] * size + least).all())
    assert torch.equal(y[bound == 0], before[bound == 0])


MAKERS = {
    "signs": lambda out, columns, n: signs(
        out, columns, 1 + n % 3, ("tensor", "row", "column")[n // 3 % 3], n % 2 == 1
    ),
    "codes": lambda out, columns, n: grouped(
        out, columns, (2, 3, 4, 8, 1, 7)[n % 6], (32, 5, 0)[n // 6 % 3], n % 4 < 2
    ),
    "sparse": lambda out, columns, n: sparse(out, columns, ("float16", "sign", 2, "float32", 5)[n % 5], n % 3 / 2),
    "lowrank": lambda out, columns, n: lowrank(out, columns, 1 + n % min(out, columns, 19), FLOATS[n % 3]),
    "dense": lambda out, columns, n: Dense((out, columns), "delta", random(out, columns).to(DTYPES[n % 3])),
}
FLOATS, DTYPES = ("float16", "bfloat16", "float32"), (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("layout", MAKERS)
@settings(max_examples=16, derandomize=True, database=None, deadline=None)
@given(
    out=st.integers(1, 37),
    columns=st.sampled_from([1, 7, 32, 33, 50, 64, 95]),
    row_slots=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    blocks=st.sampled_from([DOT, SPLIT, SELECT]),
    dtype=st.sampled_from(list(TOLERANCE)),
    n=st.integers(0, 17),
)
def test_products_are_those_of_the_dense_term(layout, out, columns, row_slots, blocks, dtype, n):
    torch.manual_seed(n)
    make = MAKERS[layout]
    check(
        {(1, 0): [make(out, columns, n)], (3, 0): [make(out, columns, n + 1)]},
        (out,),
        columns,
        row_slots,
        blocks,
        dtype,
    )


@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
@pytest.mark.parametrize("zeros", [False, True])
def test_signs_of_every_kind(scale, zeros):
    check({(1, 0): [signs(19, 70, 2, scale, zeros)]}, (19,), 70, [1, 1, 0, 1], SELECT, torch.float16)
    check({(1, 0): [signs(19, 70, 2, scale, zeros)]}, (19,), 70, [1, 1, 0, 1], SPLIT, torch.float32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (6, True)])
def test_codes_of_every_width(bits, group, symmetric):
    check({(1, 0): [grouped(17, 40, bits, group, symmetric)]}, (17,), 40, [0, 1, 1], DOT, torch.float16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_kept_codes_straddle_words(bits):
    check({(1, 0): [sparse(17, 65, bits, 0.8)]}, (17,), 65, [1, 0], SELECT)


@pytest.mark.parametrize("blocks", [DOT, SPLIT, SELECT])
def test_one_call_serves_layouts_projections_and_tenants_together(blocks):
    places = {
        (1, 0): [signs(19, 70, 2), lowrank(19, 70, 18)],
        (1, 2): [grouped(33, 70), signs(33, 70)],
        (2, 1): [sparse(5, 70), sparse(5, 70, "sign")],
        (2, 2): [lowrank(33, 70, 2), lowrank(33, 70, 3), Dense((33, 70), "delta", random(33, 70))],
    }
    check(places, (19, 5, 33), 70, [2, 0, 0, 1, 1, 3, 2] + [1] * (3 if blocks is SELECT else 17), blocks)


def test_packed_factors_are_unpacked():
    left, right = grouped(3, 20, scale="float32"), grouped(3, 40, scale="float32")
    check({(1, 0): [Lowrank.from_terms(left, right, 1e6)]}, (20,), 40, [1, 0, 1])


def test_half_precision_holds_column_scales_of_any_magnitude():
    bits, scale = pack_bits(torch.ones(1, 95, dtype=torch.bool)), torch.full((1, 95), 1e-8)
    term = Signs((1, 95), "column", "plus", (bits,), (scale,))
    x, y = torch.full((1, 95), 2.0, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    add_terms_(y, x, table_of({(1, 0): [term]}, (1,), 95), RowPieces.of(RowGroups.of([1]), DEVICE, blocks=DOT))
    assert abs(float(y) - 95 * 2e-8) < 2.0**-24  # each addend alone is below the least float16


def test_default_sizes_serve_rows_of_many_tenants():
    places = {(slot, 0): [signs(20, 300)] for slot in (1, 2, 3)}
    assert RowPieces.of(RowGroups.of([1, 2, 0, 3]), DEVICE).blocks == Blocks.choose(1)
    check(places, (20,), 300, [1, 2, 0, 3], blocks=None)
    check(places, (20,), 300, [1] * 5 + [2], blocks=None, dtype=torch.float16)


def table_bytes(table):
    return sum(part.numel() * part.element_size() for part in (*table.counts.values(), *table.fields.values()))


def test_cleared_and_replaced_slots_lose_their_old_terms():
    first, second = signs(8, 33), sparse(8, 33)
    table = table_of({(1, 0): [first], (2, 0): [first]}, (8,), 33)
    assert table.nbytes == 2 * pack(first, DEVICE).nbytes + table_bytes(table)
    table.put(1, 0, [pack(second, DEVICE)])
    table.clear(2)
    assert table.launches == (("sparse", 0, True),)
    x, y = random(2, 33), torch.zeros(2, 8)
    add_terms_(y, x, table, RowGroups.of([1, 2]))
    assert torch.allclose(y[0].double(), x[0].double() @ second.to_dense().double().T, atol=1e-9)
    assert not y[1].any()
    table.clear(1)
    assert table.nbytes == table_bytes(table) + 16  # one tile
    assert table.launches == ()


def test_clearing_a_slot_leaves_the_others():
    term = signs(8, 33)
    table = table_of({(1, 0): [term], (2, 0): [term]}, (8,), 33)
    table.clear(1)
    y = torch.zeros(2, 8)
    add_terms_(y, random(2, 33), table, RowGroups.of([1, 2]))
    assert not y[0].any() and y[1].all()


def test_pieces_are_refilled_in_place_within_their_capacity():
    table = table_of({(1, 0): [signs(8, 33)]}, (8,), 33)
    pieces = RowPieces.of(RowGroups.of([0, 0, 0]), DEVICE, blocks=SELECT, capacity=2)
    memory = pieces.table.data_ptr()
    x, y = random(3, 33), torch.zeros(3, 8)
    add_terms_(y, x, table, pieces)
    assert not y.any()
    pieces.refill(RowGroups.of([0, 1, 1]))
    add_terms_(y, x, table, pieces)
    assert pieces.table.data_ptr() == memory and not y[0].any() and y[1:].all()
    with pytest.raises(KernelError, match="room is for 2"):
        pieces.refill(RowGroups.of([1] * 5))


def test_bytes_are_those_of_disk_where_inputs_fill_blocks():
    for term in (
        signs(24, 128, 2, "row"),
        grouped(24, 128, 3, 32),
        lowrank(24, 64),
        Dense((4, 64), "delta", random(4, 64)),
    ):
        kept_elsewhere = 0 if term.name in ("signs", "dense") else 4  # the gain is one of the fields
        assert pack(term, DEVICE).nbytes == term.nbytes - kept_elsewhere
    dense = sparse(24, 64)
    assert pack(dense, DEVICE).nbytes == dense.nbytes + 4 * 24


def test_strides_of_rows_are_followed():
    table = table_of({(1, 0): [signs(8, 33)]}, (8,), 33)
    x, y = random(3, 50)[:, 5:38], torch.zeros(3, 20)
    add_terms_(y[:, 6:14], x, table, RowGroups.of([1, 0, 1]))
    other = torch.zeros(3, 8)
    add_terms_(other, x.contiguous(), table, RowGroups.of([1, 0, 1]))
    assert torch.equal(y[:, 6:14], other) and not y[:, :6].any() and not y[:, 14:].any()


def refused(match, y, x, row_slots=(1,), terms=True):
    table = table_of({(1, 0): [signs(8, 33)]} if terms else {}, (8,), 33)
    with pytest.raises(KernelError, match=match):
        add_terms_(y, x, table, RowGroups.of(list(row_slots)))


def test_what_does_not_fit_is_refused_before_a_launch():
    refused("do not fit 1 rows", torch.zeros(1, 9), random(1, 33))
    refused("do not fit 2 rows", torch.zeros(1, 8), random(1, 33), (1, 1))
    refused("both must be", torch.zeros(1, 8).half(), random(1, 33))
    refused("not adjacent", torch.zeros(8, 2).T, random(2, 33), (1, 1))
    refused("slot 4 is outside", torch.zeros(1, 8), random(1, 33), (4,))
    if INTERPRETED:
        refused("bfloat16 wrongly", torch.zeros(1, 8).bfloat16(), random(1, 33).bfloat16())


def test_what_a_table_cannot_hold_is_refused():
    table = TermTable((8,), 33, 3, depth=1, device=DEVICE)
    term = pack(signs(8, 33), DEVICE)
    for slot, projection in ((0, 0), (3, 0), (1, 1), (-1, 0)):
        with pytest.raises(KernelError, match="outside a table"):
            table.put(slot, projection, [term])
    with pytest.raises(KernelError, match="does not fit projection"):
        table.put(1, 0, [pack(signs(8, 32), DEVICE)])
    with pytest.raises(KernelError, match="more than 1 terms"):
        table.put(1, 0, [term, term])
    with pytest.raises(KernelError, match="no product"):
        pack(Dense((8, 33), "value", random(8, 33)), DEVICE)
    assert table.launches == ()
