"""Products of mixed batches against float64, for every layout, dtype and instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import parse_codec
from deltakeeper.errors import KernelError, LayoutError
from deltakeeper.kernels import RowGroups, add_rows_, add_terms_, backend, held_terms, hold, linear, linears
from deltakeeper.layouts import Dense, Layout, Signs
from deltakeeper.layouts.bits import pack_bits

CODECS = (
    "bitdelta",
    "bitdelta:bits=3",
    "bitdelta:scale=row",
    "svd:rank=1",
    "magnitude:keep=0.1",
    "compeft",
    "dare:p=0.5",
    "rtn:bits=3",
    "rtn:bits=4",
    "dense",
    "bitdelta+svd:rank=1",
    "random_sign",
    "dqrelo",
    "ultradelta",
    "impart",
    "delta_come",
    "deltazip",
)
SHAPES = ((64, 128), (37, 45), (1, 33), (300, 40), (130, 576))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 1, 2, 0, 2, 2, 2, 2, 2, 2, 1)

compiled = pytest.mark.skipif(backend().name != "compiled", reason="the compiled kernels were not built")


def encode(spec: str, out: int, columns: int, seed: int = 0) -> list[Layout]:
    delta = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    return parse_codec(spec).encode(delta, name="w")


def table_of(*slots: list) -> torch.Tensor:
    """Row 0 is the base; slot i holds the i-th list of terms."""
    table = torch.zeros(len(slots) + 1, max(map(len, slots)), dtype=torch.int64)
    for i, terms in enumerate(slots, 1):
        table[i, : len(terms)] = torch.tensor([term.id for term in terms])
    return table


def largest_error(found: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    """In units of the dtype's rounding, where `floor` is the magnitude below which sums cancel."""
    return float(((found.double() - truth).abs() / (truth.abs() + floor)).max() / torch.finfo(found.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", CODECS)
def test_every_codec_in_a_mixed_batch(spec, shape, dtype):
    out, columns = shape
    terms = encode(spec, out, columns)
    held = [hold(term) for term in terms]
    table = table_of(held, held + held)
    groups = RowGroups.of(ROWS)
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((len(ROWS), columns), shape, (out,))
    )
    delta = sum(term.to_dense().double() for term in terms)
    times = groups.row_slots.double()[:, None]
    truth = x.double() @ weight.double().T + bias.double() + times * (x.double() @ delta.T)
    # float32 sums of a few hundred products differ by some units from exact ones; half precision hides that
    allowed = 16 if dtype == torch.float32 else 1
    for merge_from in (None, 4):
        merged = 4 if merge_from and dtype == torch.bfloat16 else 1  # each merged weight is rounded once more
        y = linear(x, weight, bias, table, groups, merge_from=merge_from)
        assert largest_error(y, truth, columns**0.5) <= allowed * merged
    added = (x.double() @ weight.double().T).to(dtype)
    truth = added.double() + times * (x.double() @ delta.T)
    add_terms_(added, x, table, groups)
    assert largest_error(added, truth, columns**0.5) <= allowed

    ids = torch.randint(0, out, (len(ROWS),), generator=generator)
    rows = x.clone()
    add_rows_(rows, ids, table, groups)
    assert largest_error(rows, x.double() + times * delta[ids], 0.1) <= allowed


@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    out=st.integers(1, 70),
    columns=st.integers(1, 100),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_order_of_rows(rows, out, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    deltas, held = [torch.zeros(out, columns)], []
    for scale in ("tensor", "row", "column"):
        term = _signs(out, columns, scale, generator)
        deltas.append(term.to_dense())
        held.append([hold(term)])
    table = table_of(*held)
    x = torch.randn(len(rows), columns, generator=generator)
    weight = torch.randn(out, columns, generator=generator)
    truth = torch.stack([(weight + deltas[slot]).double() @ row.double() for slot, row in zip(rows, x, strict=True)])
    y = linear(x, weight, None, table, RowGroups.of(rows))
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-4)


def _signs(out: int, columns: int, scale: str, generator: torch.Generator) -> Signs:
    plane = pack_bits(torch.rand(out, columns, generator=generator) < 0.5)
    size = {"tensor": (1,), "row": (out, 1), "column": (1, columns)}[scale]
    return Signs((out, columns), scale, "plus", (plane,), (torch.rand(size, generator=generator),))


@compiled
@pytest.mark.parametrize("spec", ["bitdelta", "bitdelta:bits=2", "rtn:bits=4", "svd:rank=3", "magnitude:keep=0.1"])
def test_a_row_does_not_depend_on_the_rows_beside_it(spec):
    out, columns = 75, 2100  # more columns than are summed at a time
    held = [[hold(term) for term in encode(spec, out, columns, seed)] for seed in range(3)]
    table = table_of(*held)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(67, columns, generator=generator).bfloat16()
    weight = torch.randn(out, columns, generator=generator).bfloat16()
    slots = torch.randint(0, 4, (len(x),), generator=generator).sort().values
    together = linear(x, weight, None, table, RowGroups.of(slots))
    for row in range(len(x)):
        alone = linear(x[row : row + 1].contiguous(), weight, None, table, RowGroups.of([int(slots[row])]))
        assert torch.equal(alone[0], together[row])


@compiled
@pytest.mark.parametrize("columns", [4096, 8192])
def test_a_row_at_the_edge_of_being_an_outlier_takes_one_path(columns):
    """Rows of these widths are padded from four on, which must not move the edge."""
    x = torch.ones(1, columns).bfloat16()
    x[0, 0] = 64 * (1 + 63**2 / columns) ** 0.5  # its largest entry is about 64 times its root mean square
    held = [hold(_signs(64, columns, "tensor", torch.Generator().manual_seed(0)))]
    table, weight = table_of(held), torch.zeros(64, columns).bfloat16()
    for factor in torch.linspace(0.97, 1.03, 61).tolist():
        row = x.clone()
        row[0, 0] *= factor
        alone = linear(row, weight, None, table, RowGroups.of([1]))
        together = linear(row.repeat(5, 1), weight, None, table, RowGroups.of([1] * 5))
        assert torch.equal(alone[0], together[3])


@compiled
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16", "torch"])
def test_every_instruction_set(isa):
    """Each is forced in a process of its own; one that this CPU lacks must say so."""
    if isa != "torch" and not torch.ops.deltakeeper.use_isa(isa):
        code, told = "import deltakeeper.kernels as k; k.backend()", "this CPU does not have it"
        done = _python(code, isa)
        assert done.returncode != 0 and told in done.stderr
        return
    torch.ops.deltakeeper.use_isa(backend().isa)
    done = _python(
        "import pytest; raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', '-x', "
        + repr(__file__)
        + ", '-k', 'mixed_batch and not 130']))",
        isa,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def _python(code: str, kernels: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DELTAKEEPER_KERNELS": kernels, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@compiled
def test_operators_tell_tracing_the_truth():
    held = [hold(term) for term in encode("bitdelta", 40, 64)]
    table, groups = table_of(held), RowGroups.of([0, 1, 1])
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    ops = torch.ops.deltakeeper
    linear(x, weight, None, table, groups)
    torch.library.opcheck(ops.linear.default, (x, weight, None, table, groups.slots, groups.starts, 2**62))
    torch.library.opcheck(ops.add_terms.default, (torch.zeros(3, 40), x, table, groups.slots, groups.starts))
    ids = torch.tensor([0, 5, 39])
    torch.library.opcheck(ops.add_rows.default, (torch.zeros(3, 64), ids, table, groups.row_slots))


@compiled
def test_one_graph_serves_every_tenant():
    held = [[hold(term) for term in encode("bitdelta", 40, 64, seed)] for seed in range(2)]
    table = table_of(*held)
    weight = torch.randn(40, 64).bfloat16()

    def step(x, slots, starts):
        return torch.ops.deltakeeper.linear(x, weight, None, table, slots, starts, 2**62).relu()

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64).bfloat16()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ([0, 1, 2], [2, 1, 0], [1, 2, 1]):
            groups = RowGroups.of(rows)
            expected = linear(x, weight, None, table, groups).relu()
            assert torch.equal(compiled_step(x, groups.slots, groups.starts), expected)


def test_terms_are_given_back():
    before = held_terms()
    term = hold(_signs(8, 40, "tensor", torch.Generator().manual_seed(0)))
    table = torch.tensor([[0], [term.id]])
    x, weight = torch.randn(1, 40), torch.randn(8, 40)
    linear(x, weight, None, table, RowGroups.of([1]))
    assert held_terms() == before + 1 and term.nbytes >= 8 * 8
    term.release()
    term.release()
    assert held_terms() == before
    with pytest.raises((KernelError, LayoutError), match="not held"):
        linear(x, weight, None, table, RowGroups.of([1]))
    hold(_signs(8, 40, "tensor", torch.Generator().manual_seed(0)))
    assert held_terms() == before  # nobody kept it


@pytest.mark.parametrize(
    ("slots", "starts", "words"),
    [([5], [0, 2], "slot"), ([0], [0, 3], "rows"), ([0, 0], [0, 3, 2], "starts|rows"), ([-1], [0, 2], "slot")],
)
@compiled
def test_groups_that_do_not_fit_are_refused(slots, starts, words):
    groups = RowGroups(torch.tensor(slots), torch.tensor(starts), torch.zeros(2, dtype=torch.int64))
    x, weight = torch.randn(2, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    with pytest.raises(KernelError, match=words):
        linear(x, weight, None, torch.zeros(2, 1, dtype=torch.int64), groups)


@compiled
def test_tensors_that_do_not_fit_are_refused():
    table, groups = torch.zeros(2, 1, dtype=torch.int64), RowGroups.of([0, 0])
    x, weight = torch.randn(2, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    with pytest.raises(KernelError, match="shape"):
        linear(x, weight[:, :32].contiguous(), None, table, groups)
    with pytest.raises(KernelError, match="contiguous"):
        linear(x, weight.repeat(1, 2)[:, ::2], None, table, groups)
    with pytest.raises(KernelError, match="bias"):
        linear(x, weight, torch.zeros(8), table, groups)
    other = hold(_signs(9, 40, "tensor", torch.Generator().manual_seed(0)))
    with pytest.raises(KernelError, match="9 by 40"):
        linear(x, weight, None, torch.tensor([[0], [other.id]]), RowGroups.of([1, 1]))
    with pytest.raises(KernelError, match="row of a term"):
        add_rows_(torch.zeros(1, 40), torch.tensor([9]), torch.tensor([[0], [other.id]]), RowGroups.of([1]))


def test_a_term_must_be_an_addend():
    with pytest.raises(LayoutError, match="dense value"):
        hold(Dense((2, 2), "value", torch.zeros(2, 2)))


def test_negative_slots_are_refused():
    with pytest.raises(KernelError, match="negative"):
        RowGroups.of([0, -1])


def test_several_weights_at_once():
    shapes = ((96, 64), (33, 64), (1, 64))
    held = [[hold(term) for term in encode("bitdelta", *shape, seed)] for seed, shape in enumerate(shapes)]
    tables = torch.stack([table_of(terms, []) for terms in held])
    groups = RowGroups.of([0, 1, 1, 2, 1])
    x = torch.randn(5, 64).bfloat16()
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    together = linears(x, weights, tables, groups)
    for y, weight, table in zip(together, weights, tables, strict=True):
        assert torch.equal(y, linear(x, weight, None, table, groups))
