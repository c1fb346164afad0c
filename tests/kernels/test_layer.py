"""A whole decoder layer in one operator gives the bits of its parts, for tenants too, and refuses what does not fit."""

import pytest
import torch

from deltakeeper.errors import KernelError
from deltakeeper.kernels import RowGroups, backend, hold
from deltakeeper.kernels.layer import _plain, decoder_layer
from deltakeeper.layouts import Signs
from deltakeeper.layouts.bits import pack_bits

pytestmark = pytest.mark.skipif(backend().name != "compiled", reason="the compiled kernels were not built")

WIDTH, HEADS, KV_HEADS, DIM, INNER = 48, 4, 2, 12, 80
SHAPES = [(HEADS * DIM, WIDTH), (KV_HEADS * DIM, WIDTH), (KV_HEADS * DIM, WIDTH), (WIDTH, HEADS * DIM)]
SHAPES += [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]


def parts(rows: list[int], generator: torch.Generator) -> dict:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.3).bfloat16()

    held, count = [], len(rows)
    terms = torch.zeros(7, 3, 1, dtype=torch.int64)
    for at, shape in enumerate(SHAPES):
        for slot in (1, 2):
            plane = pack_bits(torch.rand(shape, generator=generator) < 0.5)
            held.append(hold(Signs(shape, "tensor", "plus", (plane,), (torch.tensor([0.02]),))))
            terms[at, slot, 0] = held[-1].id
    groups = RowGroups.of(rows)
    return {
        "held": held,
        "x": draw(count, WIDTH),
        "weights": [draw(*shape) for shape in SHAPES],
        "norms": [draw(3, WIDTH) + 1, draw(1, WIDTH) + 1],
        "norm_slots": [groups.row_slots, groups.base_slots],
        "terms": terms,
        "groups": groups,
        "turns": (draw(count, DIM), draw(count, DIM)),
        "cache": (draw(4, KV_HEADS, 16, DIM), draw(4, KV_HEADS, 16, DIM)),
        "places": torch.arange(count) * 16 + 5,
        "tables": torch.arange(count, dtype=torch.int32)[:, None],
        "query_starts": torch.arange(count + 1, dtype=torch.int32),
        "lengths": torch.full((count,), 6, dtype=torch.int32),
    }


def run(given: dict, **changes: object) -> torch.Tensor:
    own = given | changes
    named = {key: own[key] for key in own if key != "held"}
    return decoder_layer(**named, eps=1e-5, scale=DIM**-0.5, window=4)


def test_the_bits_are_those_of_the_parts():
    given = parts([0, 1, 1, 2], torch.Generator().manual_seed(0))
    caches = [tuple(half.clone() for half in given["cache"]) for _ in range(2)]
    whole = run(given, cache=caches[0])
    groups = given["groups"]
    apart = _plain(
        given["x"],
        given["weights"],
        given["norms"],
        given["norm_slots"],
        given["terms"],
        groups.slots,
        groups.starts,
        *given["turns"],
        *caches[1],
        *(given[key] for key in ("places", "tables", "query_starts", "lengths")),
        *(1e-5, DIM**-0.5, 4, 0.0, 2**62),
    )
    assert torch.equal(whole, apart)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    assert not torch.equal(caches[0][0], given["cache"][0])


def test_tenants_differ_and_rows_do_not_meet():
    given = parts([0, 1, 1, 2], torch.Generator().manual_seed(1))
    together = run(given)
    base = run(given, groups=RowGroups.of([0, 0, 0, 0]))
    assert torch.equal(together[0], base[0]) and not torch.equal(together[1:], base[1:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"places": torch.tensor([0, 16, 32, 64])}, "place"),
        ({"tables": torch.full((4, 1), 9, dtype=torch.int32)}, "block"),
        ({"terms": torch.zeros(6, 3, 1, dtype=torch.int64)}, "table"),
        ({"x": torch.zeros(4, WIDTH)}, "contiguous"),
        (
            {"weights": [*(torch.zeros(s).bfloat16() for s in SHAPES[:6]), torch.zeros(WIDTH - 1, INNER).bfloat16()]},
            "columns",
        ),
        ({"turns": (torch.zeros(4, DIM), torch.zeros(4, DIM))}, "dtype"),
    ],
    ids=["places", "blocks", "terms", "dtype", "down", "turns"],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(KernelError, match=words):
        run(parts([0, 1, 1, 2], torch.Generator().manual_seed(2)), **changes)


def test_the_operator_is_what_tracing_is_told():
    given = parts([0, 1, 1, 2], torch.Generator().manual_seed(3))
    groups = given["groups"]
    arguments = (
        *(given[key] for key in ("x", "weights", "norms", "norm_slots", "terms")),
        *(groups.slots, groups.starts, *given["turns"], *given["cache"]),
        *(given[key] for key in ("places", "tables", "query_starts", "lengths")),
        *(1e-5, DIM**-0.5, 0, 0.0, 2**62),
    )
    run(given)
    torch.library.opcheck(torch.ops.deltakeeper.decoder_layer.default, arguments)
