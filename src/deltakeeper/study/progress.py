"""Progress of a study in the terminal: one bar for the whole with time left, one for what is running now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

TRAINING_SHARE = 6
"""How many evaluated cells one fine-tune takes, roughly; it only steers the estimate of the time left."""


class Progress:
    """A context manager that draws the bars; outside a terminal it prints one line a finished step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._whole = self._bars.add_task("Whole study", total=None, note="")

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def plan(self, cells: Mapping[str, Sequence[str]]) -> None:
        """Tell what is to be done: variants by attack, and one fine-tune each."""
        total = sum(TRAINING_SHARE + len(variants) for variants in cells.values())
        self._bars.update(self._whole, total=total)

    def skip(self, attack: str, cells: int) -> None:
        """Count cells that an earlier run finished."""
        self._bars.advance(self._whole, cells)

    def trained(self, attack: str) -> None:
        """Count a fine-tune that an earlier run finished."""
        self._bars.advance(self._whole, TRAINING_SHARE)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.print(text)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar for one piece of work; gives a function that takes how much is done."""
        task = self._bars.add_task(label, total=total, note="")
        try:
            yield lambda done: self._bars.update(task, completed=done)
        finally:
            self._bars.remove_task(task)

    @contextmanager
    def training(self, attack: str, title: str) -> Iterator[Callable[[int, int, float, float], None]]:
        """A bar for one fine-tune, with loss and tokens per second."""
        task = self._bars.add_task(f"Fine-tune: {title}", total=None, note="")
        shown = 0.0
        last = (0, 0, 0.0, 0.0)

        def report(step: int, total: int, loss: float, speed: float) -> None:
            nonlocal shown, last
            last = (step, total, loss, speed)
            self._bars.update(task, total=total, completed=step, note=f"loss {loss:.2f}, {speed:.0f} tokens/s")
            share = TRAINING_SHARE * step / total
            self._bars.advance(self._whole, share - shown)
            shown = share

        try:
            yield report
        finally:
            self._bars.remove_task(task)
        step, total, loss, speed = last
        self._finish(f"Fine-tuned '{attack}': {step} of {total} steps, last loss {loss:.3f}, {speed:.0f} tokens/s.")

    @contextmanager
    def cell(self, attack: str, label: str) -> Iterator[None]:
        """A bar for one cell of the study."""
        with self.task(f"{attack}: {label}"):
            yield
        self._bars.advance(self._whole, 1)
        self._finish(f"Measured '{attack}': {label}.")

    def _finish(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line)
