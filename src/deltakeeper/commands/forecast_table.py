"""How the estimate of a study is shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from deltakeeper.study.forecast import Forecast


def print_forecast(estimate: Forecast, console: Console) -> None:
    """A row a fine-tune, the sums, and what is missing before it can run."""
    table = Table(box=None, pad_edge=False)
    for name in ("fine-tune", "seed"):
        table.add_column(name, no_wrap=True)
    for name in ("cells", "prompts", "train", "compress", "answer", "weights", "deltas"):
        table.add_column(name, justify="right")
    for line in estimate.lines:
        table.add_row(
            f"{line.group}/{line.name}",
            str(line.seed),
            str(line.cells),
            str(line.prompts),
            in_time(line.train_seconds),
            in_time(line.make_seconds),
            in_time(line.answer_seconds),
            in_units(line.model_bytes),
            in_units(line.delta_bytes),
        )
    console.print(table)
    console.print(
        f"\n{estimate.study}: {estimate.cells} cells of {len(estimate.lines)} fine-tunes of {estimate.base} "
        f"({estimate.parameters:,} weights).\n"
        f"About {in_time(estimate.seconds)} on {estimate.machine}; {in_units(estimate.disk_bytes)} of disk for weights "
        f"and deltas, {in_units(estimate.cells_bytes)} for cells, {in_units(estimate.memory_bytes)} of memory for "
        f"{estimate.workers} {'worker' if estimate.workers == 1 else 'workers'}.",
        highlight=False,
    )
    for sentence in dict.fromkeys(line.missing for line in estimate.lines if line.missing):
        console.print(f"Before it can run: {sentence}", highlight=False, markup=False)


def in_time(seconds: float) -> str:
    """A duration in two units: `40 s`, `12 min`, `5 h 10 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def in_units(count: float) -> str:
    """Bytes in a decimal unit: `13.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
