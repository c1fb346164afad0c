"""What all verbs share: where they print, how they show sizes, and a bar for long work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    """Console for results."""
    return Console(highlight=False)


def print_json(value: Any) -> None:
    """Print a JSON object and nothing else, for scripts."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True) + "\n")


def in_bytes(n: int) -> str:
    """A size in bytes and in decimal units, `17,234,567 bytes (17.2 MB)`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n:,} bytes ({n / size:.1f} {unit})"
    return f"{n:,} bytes"


def times(ratio: float) -> str:
    """A ratio of sizes in words, `3.1 times smaller`."""
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"


@contextmanager
def bar(label: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error; gives a function that takes (done, in all, name of the next)."""
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal) as bars:
        task = bars.add_task(label, total=None, name="")
        yield lambda done, total, name: bars.update(task, completed=done, total=total, name=name)
