"""How long the Triton products take on this GPU, beside torch's own matrix product of the base; prints JSON.

    python benchmarks/triton_products.py --save

Times are medians of `triton.testing.do_bench`, which clears the cache between calls: of calls from Python, and of a
replayed CUDA graph, without what Python costs. The base's product in bfloat16 is measured in the same process, and how
fast a copy is, which bounds the bytes a second that a product can read. Every product is compared with one in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys

import record
import torch
from triton.testing import do_bench

from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.triton import RowPieces, TermTable, add_terms_, pack
from deltakeeper.layouts import Dense, GroupedInt, Lowrank, Signs, Sparse
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import pack_bits

SIZE = 4096
ROUNDS = 3


def terms() -> dict[str, Layout]:
    """One term of each layout, 4096 x 4096."""
    shape = (SIZE, SIZE)
    signs = [pack_bits(torch.rand(shape) < 0.5) for _ in range(2)]
    one, two = torch.tensor([1e-3]), torch.tensor([5e-4])
    return {
        "1-bit": Signs(shape, "tensor", "plus", (signs[0],), (one,)),
        "2-bit": Signs(shape, "tensor", "plus", tuple(signs), (one, two)),
        "4-bit groups": GroupedInt.from_matrix(torch.randn(shape) * 1e-3, 4, 128, symmetric=True),
        "rank 16": Lowrank.from_factors(torch.randn(SIZE, 16) * 1e-2, torch.randn(16, SIZE) * 1e-2, "float16"),
        "10 % kept": Sparse.from_matrix(torch.randn(shape) * 1e-3, pack_bits(torch.rand(shape) < 0.1), "float16"),
        "dense": Dense(shape, "delta", (torch.randn(shape) * 1e-3).bfloat16()),
    }


def median_ms(work) -> float:  # noqa: ANN001
    """Median milliseconds of a call."""
    return float(do_bench(work, warmup=10, rep=40, return_mode="median"))


def captured(work):  # noqa: ANN001, ANN201
    """A CUDA graph of a call, as a call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copy_rate() -> float:
    """Gigabytes a second, read and written, of a copy of 2 GiB on the device."""
    source = torch.randn(2**29, device="cuda")
    into = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: into.copy_(source)) / 1e6


def measure(term: Layout, tenants: int, rows: int) -> dict[str, float]:
    """A product of `rows` rows for each of some tenants, and the base's product of all of them."""
    table = TermTable((SIZE,), SIZE, tenants + 1)
    packed = pack(term, "cuda")
    for slot in range(1, tenants + 1):  # memory of its own for each
        own = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        table.put(slot, 0, [dataclasses.replace(packed, tensors=own)])
    slots = [slot for slot in range(1, tenants + 1) for _ in range(rows)]
    pieces = RowPieces.of(RowGroups.of(slots), "cuda")
    x = torch.randn(len(slots), SIZE, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(len(slots), SIZE, device="cuda", dtype=torch.bfloat16)
    add_terms_(y, x, table, pieces)
    expected = x.double() @ term.to_dense().cuda().double().T
    error = float((y.double() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise SystemExit(f"a product of {term.name} is off by {error:.1e}")
    weight = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    ours, base = lambda: add_terms_(y, x, table, pieces), lambda: torch.mm(x, weight.T)
    works = {"ms": ours, "graph_ms": captured(ours), "base_ms": base, "base_graph_ms": captured(base)}
    rounds = [{name: median_ms(work) for name, work in works.items()} for _ in range(ROUNDS)]
    times = {name: statistics.median(found[name] for found in rounds) for name in works}
    moved = tenants * packed.nbytes + x.nbytes + 2 * y.nbytes
    of_base = times["graph_ms"] / times["base_graph_ms"]
    return {**times, "of_base": of_base, "bytes": moved, "gb_per_s": moved / times["graph_ms"] / 1e6, "error": error}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/triton.json as well")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        {"layout": name, "tenants": tenants, "rows_each": each, **measure(term, tenants, each)}
        for name, term in terms().items()
        for tenants, each in ((1, 1), (8, 1), (32, 1), (1, 128), (8, 16))
    ]
    copied = copy_rate()
    result = {"gpu": torch.cuda.get_device_name(), "size": SIZE, "copy_gb_per_s": copied, "products": rows}
    if given.save:
        record.save("triton", result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
