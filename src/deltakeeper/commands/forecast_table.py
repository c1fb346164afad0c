"""How the estimate of a study is shown."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from deltakeeper.study.forecast import Forecast, Line

NUMBERS = 48
"""Columns of the terminal that are not the names': six numbers, as wide as they get, and the space between them."""
NARROWEST = 20


def print_forecast(estimate: Forecast, console: Console) -> None:
    """A row an attack of a group with its seeds summed up, the sums of all, and what is missing before it can run."""
    width = max(NARROWEST, console.width - NUMBERS - 8 * any(line.look_seconds for line in estimate.lines))
    table = Table(box=None, pad_edge=False)
    table.add_column("what is trained", no_wrap=True)
    looks = any(line.look_seconds for line in estimate.lines)
    for name in ("seeds", "cells", "train", "make", "ask", *(["look"] if looks else []), "disk"):
        # The number stands in the last line of a folded name, where the next row does not look like a part of it.
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    attacks: dict[str, list[Line]] = {}
    for line in estimate.lines:
        attacks.setdefault(f"{line.group}/{line.name}", []).append(line)
    for name, lines in attacks.items():
        table.add_row(
            fold(name, width),
            str(len(lines)),
            str(sum(line.cells for line in lines)),
            in_time(sum(line.train_seconds for line in lines)),
            in_time(sum(line.make_seconds for line in lines)),
            in_time(sum(line.answer_seconds for line in lines)),
            *([in_time(sum(line.look_seconds for line in lines))] if looks else []),
            in_units(sum(line.model_bytes + line.delta_bytes for line in lines)),
        )
    console.print(table, markup=False)
    console.print(
        f"\n{estimate.study}: {estimate.cells} cells of {len(estimate.lines)} fine-tunes of {estimate.base} "
        f"({estimate.parameters:,} weights).\n"
        f"About {in_time(estimate.seconds)} at the rates of {estimate.machine}; {in_units(estimate.disk_bytes)} of "
        f"disk for weights and deltas, {in_units(estimate.cells_bytes)} for cells, {in_units(estimate.memory_bytes)} "
        f"of memory for {estimate.workers} {'worker' if estimate.workers == 1 else 'workers'}.",
        highlight=False,
    )
    for sentence in estimate.notes:
        console.print(sentence, highlight=False, markup=False)
    for sentence in dict.fromkeys(line.missing for line in estimate.lines if line.missing):
        console.print(f"Before it can run: {sentence}", highlight=False, markup=False)


def fold(name: str, width: int) -> str:
    """A name in lines of up to `width` characters, broken between its parts, and a longer part between its words."""
    lines = [""]
    for part in re.split(r"(?<=/)|(?=\.)", name):
        fits = len(lines[-1]) + len(part) <= width
        for piece in [part] if fits or len(part) + 2 <= width else re.split(r"(?<=[_-])", part):
            if lines[-1] and len(lines[-1]) + len(piece) > width:
                lines.append("  ")
            lines[-1] += piece
    return "\n".join(lines)


def in_time(seconds: float) -> str:
    """A duration: `40 s`, `12 min`, `5.2 h`, `3.5 d`, `739 d`."""
    for unit, size, least in (("d", 86_400, 172_800), ("h", 3600, 5400)):
        if seconds >= least:
            count = seconds / size
            return f"{count:.{1 if count < 100 else 0}f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def in_units(count: float) -> str:
    """Bytes in a decimal unit: `13.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
