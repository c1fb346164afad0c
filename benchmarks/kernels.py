"""Products of packed terms beside the base's own product, on 4096 x 4096, in interleaved rounds; errors first.

    python benchmarks/kernels.py --threads 1 2 --rounds 7

Each round runs every contestant once, on weights and masks that are cycled so that they come from memory. Figures are
milliseconds of a call, medians over rounds; `thread` clocks count only the time that the process ran, for one thread on
a machine that others use too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
import torch.nn.functional as F

from deltakeeper.codecs import parse_codec
from deltakeeper.kernels import HeldTerm, RowGroups, add_terms_, backend, hold, linear
from deltakeeper.layouts import Signs
from deltakeeper.layouts.bits import pack_bits

SIDE = 4096
WEIGHTS, MASKS = 6, 32
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
TENANTS = (1, 2, 4, 8, 16, 32, 64)
OTHERS = {
    "2 planes": "bitdelta:bits=2",
    "rank 64": "svd:rank=64",
    "4 bits": "rtn:bits=4",
    "2 bits": "rtn:bits=2",
    "5 % kept": "magnitude:keep=0.05",
}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--record", default="kernels")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    torch.manual_seed(0)
    weights = [torch.randn(SIDE, SIDE).mul_(0.02).bfloat16() for _ in range(WEIGHTS)]
    masks = [_plane(i) for i in range(MASKS)]
    rows: dict[str, Any] = {"backend": backend().isa or backend().name, "rounds": arguments.rounds}
    rows |= {"clock": arguments.clock, "errors": _errors(weights[0], masks), "timings": []}
    others = {name: [hold(t) for t in _encode(spec)] for name, spec in OTHERS.items()}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for count in ROWS:
            rows["timings"].append(
                _race(_same(weights, masks, count, others), arguments.rounds, clock, count, 1, threads)
            )
            print(json.dumps(rows["timings"][-1]), flush=True)
        for count in TENANTS:
            rows["timings"].append(_race(_mixed(weights, masks, count), arguments.rounds, clock, count, count, threads))
            print(json.dumps(rows["timings"][-1]), flush=True)
        record.save(arguments.record, rows)


def _plane(seed: int) -> HeldTerm:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (SIDE, SIDE // 32), dtype=torch.int64, generator=generator)
    return hold(Signs((SIDE, SIDE), "tensor", "plus", (words.to(torch.int32),), (torch.tensor([0.001]),)))


def _encode(spec: str) -> list[Any]:
    delta = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)).mul_(0.001)
    return parse_codec(spec).encode(delta, name="w")


def _errors(weight: torch.Tensor, masks: list[HeldTerm]) -> dict[str, float]:
    """Of the sign product, against float64: in units of bfloat16 rounding of y, and of the delta's part alone."""
    generator = torch.Generator().manual_seed(2)
    signs = torch.rand(SIDE, SIDE, generator=generator) < 0.5
    term = Signs((SIDE, SIDE), "tensor", "plus", (pack_bits(signs),), (torch.tensor([0.001]),))
    held = hold(term)
    table = torch.tensor([[0], [held.id]])
    found = {}
    for name, x in (("gaussian", torch.randn(4, SIDE, generator=generator)), ("with outliers", None)):
        if x is None:
            x = torch.randn(4, SIDE, generator=generator)
            x[:, :4] *= 50
        x = x.bfloat16()
        part = x.double() @ term.to_dense().double().T
        whole = x.double() @ weight.double().T + part
        groups = RowGroups.of([1] * len(x))
        y = linear(x, weight, None, table, groups).double()
        delta = torch.zeros(len(x), SIDE)
        add_terms_(delta, x.float(), table, groups)
        rounded = torch.zeros(len(x), SIDE, dtype=torch.float32)
        add_terms_(rounded, x, table, groups)
        # of the entry, or of a typical one where the sum cancels: what is left of that is anybody's rounding
        ulp = 2.0 ** (torch.maximum(whole.abs(), whole.square().mean().sqrt()).log2().floor() - 7)
        found[f"{name}: y, bfloat16 ulps, worst"] = float(((y - whole).abs() / ulp).max())
        found[f"{name}: delta term, relative"] = float((rounded.double() - part).norm() / part.norm())
        found[f"{name}: delta term from float32 x, relative"] = float((delta.double() - part).norm() / part.norm())
    return found


Contest = dict[str, Callable[[int], object]]


def _table(terms: list[HeldTerm]) -> torch.Tensor:
    return torch.tensor([[0], *[[term.id] for term in terms]])


def _same(weights: list[torch.Tensor], masks: list[HeldTerm], count: int, others: dict[str, list[HeldTerm]]) -> Contest:
    """All rows of one tenant."""
    x, y = torch.randn(count, SIDE).bfloat16(), torch.zeros(count, SIDE, dtype=torch.bfloat16)
    table, base = _table(masks), RowGroups.of([0] * count)
    slots = [RowGroups.of([slot + 1] * count) for slot in range(MASKS)]
    found: Contest = {
        "torch base": lambda i: F.linear(x, weights[i % WEIGHTS]),
        "base": lambda i: linear(x, weights[i % WEIGHTS], None, table, base),
        "1 bit alone": lambda i: add_terms_(y, x, table, slots[i % MASKS]),
        "base + 1 bit": lambda i: linear(x, weights[i % WEIGHTS], None, table, slots[i % MASKS]),
        "base + 1 bit, merged tiles": lambda i: linear(
            x, weights[i % WEIGHTS], None, table, slots[i % MASKS], merge_from=1
        ),
    }
    for name, terms in others.items():
        own = torch.tensor([[0] * len(terms), [term.id for term in terms]])
        found[f"{name} alone"] = lambda i, own=own: add_terms_(y, x, own, slots[0])  # type: ignore[misc]
    return found


def _mixed(weights: list[torch.Tensor], masks: list[HeldTerm], count: int) -> Contest:
    """Each row of another tenant, and as many separate models."""
    x = torch.randn(count, SIDE).bfloat16()
    table = _table(masks)
    slots = [RowGroups.of([1 + (start + row) % MASKS for row in range(count)]) for start in range(MASKS)]
    return {
        "separate models": lambda i: [F.linear(x[row : row + 1], weights[(i + row) % WEIGHTS]) for row in range(count)],
        "base": lambda i: linear(x, weights[i % WEIGHTS], None, table, RowGroups.of([0] * count)),
        "tenants": lambda i: linear(x, weights[i % WEIGHTS], None, table, slots[i % MASKS]),
    }


def _race(
    contest: Contest, rounds: int, clock: Callable[[], float], rows: int, tenants: int, threads: int
) -> dict[str, Any]:
    turn = itertools.count()
    samples: dict[str, list[float]] = {name: [] for name in contest}
    with torch.inference_mode():
        for run in range(rounds + 1):
            for name, call in contest.items():
                start = clock()
                call(next(turn))
                if run:  # the first is to warm up
                    samples[name].append((clock() - start) * 1e3)
    medians = {name: round(statistics.median(values), 4) for name, values in samples.items()}
    spread = {name: [round(min(values), 4), round(max(values), 4)] for name, values in samples.items()}
    return {"rows": rows, "tenants": tenants, "threads": threads, "ms": medians, "range": spread}


if __name__ == "__main__":
    main()
