"""Tables and figure of benchmarks/kernels.py: products of packed terms beside the base's own product."""

from __future__ import annotations

from typing import Any

from .drawing import Line, figures, line_chart
from .tables import counted, table

OPENING = """\
Products with a 4096 x 4096 weight in bfloat16, kernels `{backend}`: milliseconds of a call, medians over {rounds}
interleaved rounds ({clock}). Weights and sign planes are cycled, so that they come from memory.
"""

CLOCKS = {"wall": "wall clock", "thread": "time that the calling thread ran, as the machine is shared"}

ERRORS = """\
Errors of one sign plane against float64, four rows of Gaussian numbers, without and with four columns 50 times as
large. *ulps* are units in the last place of a bfloat16 result; *delta term* is the plane's part alone.
"""

TIMES = """\
Two tables for each number of threads. In the first all rows are of one tenant: *torch base* is torch's product with the
weight and *base* is ours, without any term; *base + 1 bit* is ours with a sign plane, and *alone* means that a term is
added to a result that is there. In brackets the ratio to *torch base* and to *base* of the same rows. In the second
every row is of another tenant (one bit each), beside as many separate models: the same rows, each multiplied by a
weight of its own, by torch. Ranges in brackets.
"""

SEPARATE, BASE, TENANTS = "separate models", "base", "tenants"


def tables(rows: dict[str, Any]) -> str:
    """All tables, a pair for each number of threads."""
    clock = CLOCKS.get(rows["clock"], rows["clock"])
    parts = [OPENING.format(backend=rows["backend"], rounds=rows["rounds"], clock=clock)]
    errors = ((name, figures(value)) for name, value in rows["errors"].items())
    parts += [ERRORS + "\n" + table(("error", "value"), errors), TIMES]
    for threads in _threads(rows):
        parts.append(f"### {counted(threads, 'thread').capitalize()}\n")
        same, mixed = _split(rows, threads)
        if same:
            parts.append(_same(same))
        if mixed:
            parts.append(_mixed(mixed))
    return "\n".join(parts)


TRITON = """\
Products of a 4096 x 4096 term with bfloat16 rows, all tenants in one launch, as a replayed CUDA graph with a cold
cache. In milliseconds; in brackets the time relative to torch's product of all these rows with one dense bfloat16
matrix of that shape ({base:.3f} ms for one row), and the bytes of terms, x and y over the time, in gigabytes a second:
a copy on this card reaches {copy:.0f}. Called from Python without a graph, those below 0.02 ms take {least:.2f} to
{most:.2f} ms, which is the launch. The kernels of kept entries and of dense terms are not tuned.
"""
SHORT_MS = 0.02


def triton(rows: dict[str, Any]) -> str:
    """A row a layout, a column a batch."""
    products = rows["products"]
    batches = list(dict.fromkeys((row["tenants"], row["rows_each"]) for row in products))
    found = {(row["layout"], row["tenants"], row["rows_each"]): row for row in products}
    head = ("layout", *(f"{counted(tenants, 'tenant')} × {counted(each, 'row')}" for tenants, each in batches))
    body = [
        (
            layout,
            *(
                f"{(row := found[layout, *batch])['graph_ms']:.3f} ({row['of_base']:.1f}; {row['gb_per_s']:.0f})"
                for batch in batches
            ),
        )
        for layout in dict.fromkeys(row["layout"] for row in products)
    ]
    eager = [row["ms"] for row in products if row["graph_ms"] < SHORT_MS]
    told = TRITON.format(
        base=products[0]["base_graph_ms"], copy=rows["copy_gb_per_s"], least=min(eager), most=max(eager)
    )
    return f"{rows['gpu']}. {told}\n{table(head, body)}"


def figure(rows: dict[str, Any]) -> str:
    """Time of a call against the number of tenants, a panel for each number of threads."""
    panels = []
    for threads in _threads(rows):
        mixed = _split(rows, threads)[1]
        lines = [
            Line(name, [(timing["tenants"], timing["ms"][name]) for timing in mixed])
            for name in (SEPARATE, BASE, TENANTS)
        ]
        if mixed:
            panels.append((counted(threads, "thread"), lines))
    title = "Milliseconds of a product of 4096 x 4096, one row a tenant"
    return line_chart(panels, title=title, x_name="tenants", y_name="milliseconds")


def _threads(rows: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(timing["threads"] for timing in rows["timings"]))


def _split(rows: dict[str, Any], threads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Timings of one tenant's rows, and of a tenant a row."""
    here = [timing for timing in rows["timings"] if timing["threads"] == threads]
    return [t for t in here if SEPARATE not in t["ms"]], [t for t in here if SEPARATE in t["ms"]]


def _same(timings: list[dict[str, Any]]) -> str:
    head = ("product", *(counted(timing["rows"], "row") for timing in timings))
    names = dict.fromkeys(name for timing in timings for name in timing["ms"])
    return table(head, ((name, *(_cell(timing["ms"], name) for timing in timings)) for name in names))


def _cell(ms: dict[str, float], name: str) -> str:
    if name not in ms:
        return ""
    return f"{figures(ms[name])} ({ms[name] / ms['torch base']:.2f}, {ms[name] / ms['base']:.2f})"


def _mixed(timings: list[dict[str, Any]]) -> str:
    head = ("tenants", "separate models, ms", "base, ms", "tenants, ms", "separate models / tenants", "tenants / base")
    body = (
        (
            f"{timing['tenants']}",
            *(
                f"{figures(timing['ms'][name])} ({figures(timing['range'][name][0])} to "
                f"{figures(timing['range'][name][1])})"
                for name in (SEPARATE, BASE, TENANTS)
            ),
            f"**{timing['ms'][SEPARATE] / timing['ms'][TENANTS]:.2f}**",
            f"{timing['ms'][TENANTS] / timing['ms'][BASE]:.2f}",
        )
        for timing in timings
    )
    return table(head, body)
