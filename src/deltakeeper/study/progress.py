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

    def plan(self, cells: Mapping[str, int]) -> None:
        """Tell what is to be done: cells by fine-tune, and one training each."""
        self._bars.update(self._whole, total=sum(TRAINING_SHARE + count for count in cells.values()))

    def advance(self, share: float) -> None:
        """Count work that is done, in cells."""
        self._bars.advance(self._whole, share)

    def skip(self, name: str, cells: int) -> None:
        """Count cells that an earlier run finished."""
        self.advance(cells)

    def trained(self, name: str) -> None:
        """Count a fine-tune that an earlier run finished."""
        self.advance(TRAINING_SHARE)

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
    def training(self, name: str, title: str) -> Iterator[Callable[[int, int, float, float], None]]:
        """A bar for one fine-tune, with loss and tokens per second."""
        task = self._bars.add_task(f"Fine-tune: {title}", total=None, note="")
        shown = 0.0
        last = (0, 0, 0.0, 0.0)

        def report(step: int, total: int, loss: float, speed: float) -> None:
            nonlocal shown, last
            last = (step, total, loss, speed)
            self._bars.update(task, total=total, completed=step, note=f"loss {loss:.2f}, {speed:.0f} tokens/s")
            share = TRAINING_SHARE * step / max(1, total)
            self.advance(share - shown)
            shown = share

        try:
            yield report
        finally:
            self._bars.remove_task(task)
        step, total, loss, speed = last
        self.finish(f"Fine-tuned {name}: {step} of {total} steps, last loss {loss:.3f}, {speed:.0f} tokens/s.")

    @contextmanager
    def wave(self, name: str, labels: Sequence[str], batches: int) -> Iterator[Callable[[int], None]]:
        """A bar for arms that are asked together; gives a function that takes how many batches are done."""
        words = labels[0] if len(labels) == 1 else f"{len(labels)} arms together"
        shown = 0.0
        with self.task(f"{name}: {words}", batches) as update:

            def report(done: int) -> None:
                nonlocal shown
                update(done)
                share = len(labels) * done / max(1, batches)
                self.advance(share - shown)
                shown = share

            yield report
        self.advance(len(labels) - shown)
        for label in labels:
            self.finish(f"Measured {name}: {label}.")

    def finish(self, line: str) -> None:
        """Print the line of a finished step where no bar is drawn."""
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class RelayedProgress(Progress):
    """Progress of a worker: sends what is to be shown to the process that draws."""

    def __init__(self, send: Callable[[str, str | float], None]) -> None:
        """Send pairs of a method's name (`advance`, `say` or `finish`) and its argument."""
        super().__init__(Console(quiet=True))
        self._send = send

    def advance(self, share: float) -> None:
        """See `Progress.advance`."""
        self._send("advance", share)

    def say(self, text: str) -> None:
        """See `Progress.say`."""
        self._send("say", text)

    def finish(self, line: str) -> None:
        """See `Progress.finish`."""
        self._send("finish", line)


def show(progress: Progress, method: str, value: str | float) -> None:
    """Draw what a worker sent."""
    if method == "advance":
        progress.advance(float(value))
    elif method == "say":
        progress.say(str(value))
    else:
        progress.finish(str(value))
