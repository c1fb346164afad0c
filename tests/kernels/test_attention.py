"""Paged attention and writes into its cache, against float64, alone and in company, on every instruction set."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import KernelError
from deltakeeper.kernels.attention import paged_attention, write_cache_
from deltakeeper.kernels.library import INSTRUCTION_SETS, backend

compiled = pytest.mark.skipif(backend().name == "torch", reason="the kernels are not compiled")
BOUND = {torch.float32: 6e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    if backend().name == "torch":
        pytest.skip("the kernels are not compiled")
    before = torch.ops.deltakeeper.isa()
    if not torch.ops.deltakeeper.use_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    torch.ops.deltakeeper.use_isa(before)


class Case:
    """Requests as (new tokens, tokens of context) over one cache, whose unused places hold NaN."""

    def __init__(self, requests, *, heads=4, kv_heads=2, dim=64, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // 16) for _, length in requests]
        order = torch.randperm(sum(blocks) + 2, generator=generator).int()
        self.k = torch.randn(len(order), kv_heads, 16, dim, generator=generator).to(dtype)
        self.v = torch.randn(len(order), kv_heads, 16, dim, generator=generator).to(dtype)
        self.tables = torch.full((len(requests), max(blocks, default=0) + 1), -1, dtype=torch.int32)
        unused = set(order.tolist())
        for r, (count, own) in enumerate(zip(blocks, order.split([*blocks, 2])[:-1], strict=True)):
            self.tables[r, :count] = own
            unused -= set(own.tolist())
            if rest := requests[r][1] % 16:
                self.k[own[-1], :, rest:] = self.v[own[-1], :, rest:] = math.nan
        self.k[sorted(unused)] = self.v[sorted(unused)] = math.nan
        self.starts = torch.tensor([0, *itertools.accumulate(n for n, _ in requests)], dtype=torch.int32)
        self.lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        self.q = torch.randn(int(self.starts[-1]), heads, dim, generator=generator).to(dtype)

    def run(self, **options):
        options.setdefault("scale", self.q.shape[-1] ** -0.5)
        return paged_attention(self.q, self.k, self.v, self.tables, self.starts, self.lengths, **options)

    def alone(self, r, **options):
        """What request r gets when there is no other."""
        options.setdefault("scale", self.q.shape[-1] ** -0.5)
        rows = self.q[self.starts[r] : self.starts[r + 1]]
        starts = torch.tensor([0, len(rows)], dtype=torch.int32)
        return paged_attention(rows, self.k, self.v, self.tables[r : r + 1], starts, self.lengths[r : r + 1], **options)

    def exact(self, *, scale=None, window=0, softcap=0.0, sinks=None):
        scale = self.q.shape[-1] ** -0.5 if scale is None else scale
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        share = self.q.shape[1] // self.k.shape[1]
        for r, length in enumerate(self.lengths.tolist()):
            first, end = self.starts[r], self.starts[r + 1]
            table = self.tables[r, : -(-length // 16)].long()
            k, v = (
                x[table].double().transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(share, 0)
                for x in (self.k, self.v)
            )
            scores = self.q[first:end].double().transpose(0, 1) @ k.transpose(1, 2) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            own, at = torch.arange(length - int(end - first), length).unsqueeze(1), torch.arange(length)
            seen = (at <= own) & ((at > own - window) if window else True)
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)], -1)
            out[first:end] = (scores.softmax(-1)[..., :length] @ v).transpose(0, 1)
        return out


RAGGED = [(1, 96), (1, 1), (5, 17), (70, 70), (33, 200), (0, 3), (1, 130), (2, 64), (1, 65)]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("dim", [12, 13, 64, 80, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "options"),
    [
        (9, 3, {}),
        (4, 4, {"window": 37}),
        (8, 1, {"softcap": 5.0, "scale": 0.5}),
        (6, 3, {"window": 16, "softcap": 30.0, "scale": 1.0}),
        (5, 1, {"sinks": True, "window": 70}),
    ],
)
def test_equals_float64(isa, dtype, dim, heads, kv_heads, options):
    case = Case(RAGGED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor([-40.0, 0.0, 3.0, 60.0, 1.0])}
    error = (case.run(**options).double() - case.exact(**options)).abs().max()
    assert error < BOUND[dtype] * (4 if "softcap" in options else 1)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 150)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (6, 1)]),
    dim=st.integers(1, 70),
    window=st.sampled_from([0, 1, 15, 64, 65]),
    dtype=st.sampled_from(sorted(BOUND, key=str)),
)
def test_any_shape_equals_float64_and_itself_alone(requests, heads, dim, window, dtype):
    requests = [(min(n, length), length) for n, length in requests]
    case = Case(requests, heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype)
    together = case.run(window=window)
    assert torch.allclose(together.double(), case.exact(window=window), atol=BOUND[dtype], rtol=0)
    for r in range(len(requests)):
        if backend().name != "torch":
            assert torch.equal(case.alone(r, window=window), together[case.starts[r] : case.starts[r + 1]])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 24), (64, 1, 16)])
@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 20.0}])
def test_a_row_does_not_depend_on_its_company_nor_on_how_its_prompt_was_cut(isa, dtype, heads, kv_heads, dim, options):
    length = 150
    whole = Case([(length, length), (1, 77), (20, 300)], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    together = whole.run(**options)
    for r in range(3):
        assert torch.equal(whole.alone(r, **options), together[whole.starts[r] : whole.starts[r + 1]])
    for cut in (1, 7, 64, 90):  # pieces of the first request's prompt; 1 is decoding
        pieces = []
        for first in range(0, length, cut):
            end = min(first + cut, length)
            starts, lengths = torch.tensor([0, end - first]).int(), torch.tensor([end]).int()
            pieces.append(
                paged_attention(
                    whole.q[first:end], whole.k, whole.v, whole.tables[:1], starts, lengths, scale=dim**-0.5, **options
                )
            )
        assert torch.equal(torch.cat(pieces), together[:length])


@compiled
def test_threads_do_not_change_a_bit():
    case = Case([(300, 300), (1, 2000), (40, 500)], heads=6, kv_heads=2, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_nan_stays_in_its_row(isa):
    case = Case([(3, 40), (1, 20)], dtype=torch.bfloat16)
    clean = case.run()
    case.q[1] = math.nan
    out = case.run()
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("big", [3e3, -3e3])
def test_scores_that_overflow_an_exponential_are_kept_apart(isa, big):
    case = Case([(1, 100), (90, 90)], dim=8)
    case.q *= big
    assert torch.allclose(case.run().double(), case.exact(), atol=1e-4)


def test_strided_queries_and_blocks_before_the_window(isa):
    case = Case([(1, 200), (5, 100)], dtype=torch.bfloat16)
    expected = case.run(window=20)
    case.tables[0, : (200 - 20) // 16] = -5  # given away already
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.run(window=20), expected)


def test_no_queries():
    assert Case([(0, 5), (0, 0)]).run().shape == (0, 4, 64)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.tables[0].fill_(99),
        lambda c: c.tables[1].fill_(-1),
        lambda c: c.lengths.fill_(10_000),
        lambda c: c.lengths.fill_(2),
        lambda c: c.starts.copy_(torch.tensor([0, 3, 7])),
        lambda c: c.starts.copy_(torch.tensor([1, 3, 8])),
        lambda c: c.starts.copy_(torch.tensor([0, 9, 8])),
        lambda c: setattr(c, "lengths", c.lengths.long()),
        lambda c: setattr(c, "tables", c.tables[:1]),
        lambda c: setattr(c, "q", c.q[:, :3]),
        lambda c: setattr(c, "q", c.q[:, :, :32]),
        lambda c: setattr(c, "q", c.q.half()),
        lambda c: setattr(c, "q", c.q.repeat(1, 1, 2)[:, :, ::2]),
        lambda c: setattr(c, "v", c.v[1:]),
        lambda c: setattr(c, "k", c.k.transpose(0, 1)),
    ],
)
@compiled
def test_what_does_not_fit_is_refused(spoil):
    case = Case([(3, 40), (5, 70)])
    case.run()
    spoil(case)
    with pytest.raises(KernelError, match="'paged_attention' was refused"):
        case.run()


@pytest.mark.parametrize("options", [{"window": -1}, {"softcap": -1.0}, {"sinks": torch.zeros(3)}])
@compiled
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(KernelError):
        Case([(3, 40)]).run(**options)


@pytest.mark.parametrize("dtype", BOUND)
def test_write_puts_rows_where_they_belong(dtype):
    cache_k, cache_v = torch.zeros(5, 2, 16, 12, dtype=dtype), torch.zeros(5, 2, 16, 12, dtype=dtype)
    k, v = torch.randn(1, 2, 4, 12).to(dtype), torch.randn(1, 4, 2, 12).to(dtype)
    places = torch.tensor([3, 79, -1, 16])
    write_cache_(cache_k, cache_v, k[0].transpose(0, 1), v[0], places)
    for token, place in enumerate(places.tolist()):
        if place >= 0:
            assert torch.equal(cache_k[place // 16, :, place % 16], k[0, :, token])
            assert torch.equal(cache_v[place // 16, :, place % 16], v[0, token])
    assert cache_k.any(-1).sum() == cache_v.any(-1).sum() == 6  # and nothing else


@pytest.mark.parametrize(
    "change",
    [
        {"places": torch.tensor([0, 80])},
        {"places": torch.tensor([0])},
        {"k": torch.ones(2, 3, 8)},
        {"v": torch.ones(2, 2, 8).half()},
    ],
)
def test_a_write_outside_the_cache_changes_nothing(change):
    given = {
        "cache_k": torch.zeros(5, 2, 16, 8),
        "cache_v": torch.zeros(5, 2, 16, 8),
        "k": torch.ones(2, 2, 8),
        "v": torch.ones(2, 2, 8),
        "places": torch.tensor([0, 1]),
    } | change
    with pytest.raises(KernelError, match="'write_cache_' was refused"):
        write_cache_(**given)
    assert not given["cache_k"].any() and not given["cache_v"].any()


def test_operators_are_what_torch_expects():
    case = Case([(3, 40), (1, 7)], dtype=torch.bfloat16)
    case.run()  # registers
    arguments = (case.q, case.k.nan_to_num(), case.v.nan_to_num(), case.tables, case.starts, case.lengths, 0.125)
    torch.library.opcheck(torch.ops.deltakeeper.paged_attention.default, arguments)
    torch.library.opcheck(
        torch.ops.deltakeeper.write_cache_.default,
        (
            torch.zeros(3, 2, 16, 8),
            torch.zeros(3, 2, 16, 8),
            torch.ones(2, 2, 8),
            torch.ones(2, 2, 8),
            torch.tensor([5, 20]),
        ),
    )


def test_compiles_into_one_graph():
    case = Case([(3, 40), (1, 7)], dtype=torch.bfloat16)
    expected = case.run()
    run = torch.compile(lambda: case.run(), fullgraph=True, backend="eager")
    assert torch.equal(run(), expected)
