"""Utility tasks of a study: which they are, what their data hash to, and their scores as lines of a cell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.utility import ItemRecord, Prepared, Scorer, TaskSource, ask, by_measure, prepared
from deltakeeper.study.answers import Utility, UtilityItem
from deltakeeper.study.cell_file import end_line, task_lines
from deltakeeper.study.file import Task

UTILITY_RULE = "1"
MOST_FILES = 10_000


@contextmanager
def prepared_tasks(tasks: Sequence[Task]) -> Iterator[dict[str, Prepared]]:
    """Every task with its items chosen, by name, for the length of a `with` block.

    Raises:
        DataError: a task or its data cannot be read, or lm-evaluation-harness is not installed.
    """
    with ExitStack() as stack:
        yield {
            task.name: stack.enter_context(prepared([_source(task)], samples=task.limit, shots=task.shots))
            for task in tasks
        }


def scores(task: Task, ready: Prepared, scorer: Scorer) -> list[list[dict[str, Any]]]:
    """The lines of a task for every arm of a scorer, in the scorer's order.

    Raises:
        DataError: the task cannot be asked of these models.
    """
    records = ask(ready, scorer, chat=task.chat)
    return [_lines(task, [record for record in records if record.arm == arm]) for arm in scorer.arms]


def task_identity(task: Task) -> list[Any]:
    """What a task's scores depend on: its settings and the bytes of its files, wherever they lie."""
    settings = {key: value for key, value in task.model_dump(mode="json").items() if key != "path"}
    return [UTILITY_RULE, settings, None if task.path is None else _content(task.path)]


def _source(task: Task) -> TaskSource:
    return TaskSource(task.kind or task.name, None if task.path is None else Path(task.path))


def _lines(task: Task, records: Sequence[ItemRecord]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for measure, found in by_measure(records).items():
        suffix = "" if measure.filter == "none" else f", {measure.filter}"
        items = tuple(UtilityItem(str(record.doc_id), record.value) for record in found)
        lines += task_lines(f"{measure.task} {measure.metric}{suffix}", Utility(measure.metric, items))
    return [*lines, end_line(task.name)]


def _content(path: str) -> str:
    """One hash over a file, or over the names and bytes of a folder's files."""
    place = Path(path)
    if not place.exists():
        raise DataError(f"there is no data of a task at {path}; check the path.")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    if len(files) > MOST_FILES:
        raise DataError(f"{path} holds more than {MOST_FILES} files, which no task does; check the path.")
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(place)) if place.is_dir() else ""
        with file.open("rb") as opened:
            digest.update(f"{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
