"""Benchmarks by name: which files they are read from, and the YAML that tells lm-evaluation-harness so."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deltakeeper.errors import DataError
from deltakeeper.evals.utility.files import (
    TaskData,
    read_gsm8k,
    read_mmlu,
    read_passages,
    read_piqa,
    read_truthfulqa,
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MMLU_DRAFT = "78ae848c2d16e8deb49d2b024b57dd3abbb12ff17b5c6aaa39a8ac88cbc9c4e6"
"""SHA-256 of the 14,079 test rows of hendrycks/test at 785eba57 (2020-09-08), before the final 14,042."""


@dataclass(frozen=True)
class LocalTask:
    """A benchmark that is read from files.

    Attributes:
        read: reads and checks the files.
        stock: name of each lm-evaluation-harness task that is made of them, and the YAML that it builds on, relative
            to the package's `tasks` folder.
        split: what that YAML calls the rows that are asked.
        shots: few-shot examples, where the files give any.
        changes: further entries of the YAML.
    """

    read: Callable[[Path], TaskData]
    stock: dict[str, str]
    split: str
    shots: int = 0
    changes: dict[str, Any] = field(default_factory=dict)


TEXT = "text"
LOCAL: dict[str, LocalTask] = {
    "gsm8k": LocalTask(read_gsm8k, {"gsm8k_local": "gsm8k/gsm8k.yaml"}, "test", 5),
    "mmlu": LocalTask(
        read_mmlu,
        {"mmlu_local": "mmlu/default/_default_template_yaml"},
        "test",
        changes={"fewshot_split": None, "fewshot_config": None},
    ),
    "piqa": LocalTask(read_piqa, {"piqa_local": "piqa/piqa.yaml"}, "validation", changes={"training_split": None}),
    "truthfulqa": LocalTask(
        read_truthfulqa,
        {
            "truthfulqa_mc1_local": "truthfulqa/truthfulqa_mc1.yaml",
            "truthfulqa_mc2_local": "truthfulqa/truthfulqa_mc2.yaml",
        },
        "validation",
    ),
}
"""Benchmarks that can be read from files; `text` (perplexity) is the one that needs no lm-evaluation-harness."""


@dataclass(frozen=True)
class TaskSource:
    """A benchmark as asked for.

    Attributes:
        name: one of `LOCAL` or `text` with a path, else a task of lm-evaluation-harness.
        path: its files; None for data from the hub.
    """

    name: str
    path: Path | None = None


def parse_task(text: str) -> TaskSource:
    """Read `NAME=PATH`, or the name of a task of lm-evaluation-harness whose data comes from the hub.

    Raises:
        DataError: there is no such benchmark, or the name is malformed.
    """
    name, equals, path = text.partition("=")
    known = (*LOCAL, TEXT)
    if equals and (name not in known or not path):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{near[0]}'?" if near and name not in known else f"spell it {'|'.join(known)}=PATH."
        raise DataError(f"'{text}' names no benchmark that is read from a file; {hint}")
    if name == TEXT and not equals:
        raise DataError("the perplexity of a text needs its file; spell it text=PATH.")
    if not equals and not _HUB_NAME.fullmatch(name):
        raise DataError(f"'{text}' is no name of a task; spell it NAME=PATH, or give a name of lm-evaluation-harness.")
    return TaskSource(name, Path(path) if equals else None)


def read_source(source: TaskSource) -> TaskData:
    """The checked rows of a benchmark that is read from files.

    Raises:
        DataError: the files are missing, malformed or too large.
    """
    if source.path is None:
        raise DataError(f"the task {source.name} has no files; give them as {source.name}=PATH.")
    read = read_passages if source.name == TEXT else LOCAL[source.name].read
    return read(source.path)


def write_tasks(
    source: TaskSource, data: TaskData, folder: Path, package: Path, shots: int | None = None
) -> dict[str, int]:
    """Write a benchmark for lm-evaluation-harness; gives its tasks, each with its number of few-shot examples.

    Prompts and metrics stay those of the package's own YAML.

    Args:
        source: which benchmark.
        data: its rows, those that are asked alone.
        folder: where to write; nothing is written elsewhere.
        package: folder of the installed `lm_eval`.
        shots: few-shot examples; by default as many as the benchmark is known for, as far as there are rows.

    Raises:
        DataError: few-shot examples are wanted and no rows for them are given, or the package lacks a YAML.
    """
    local = LOCAL[source.name]
    count = min(local.shots, len(data.shots)) if shots is None or not local.shots else shots
    if count > len(data.shots):
        raise DataError(
            f"{source.name} has {len(data.shots)} rows for few-shot examples, not {count}; put train.jsonl beside it, "
            "or ask for fewer shots."
        )
    files = {local.split: _write_rows(folder / f"{source.name}.jsonl", data.rows)}
    changes = dict(local.changes)
    if count:
        files["train"] = _write_rows(folder / f"{source.name}-shots.jsonl", data.shots)
    elif local.shots:
        changes |= {"training_split": None, "fewshot_split": None}
    names = {}
    for name, stock in local.stock.items():
        if name == "mmlu_local" and _MMLU_DRAFT in data.sources.values():
            name = "mmlu_2020draft"
        include = package / "tasks" / stock
        if not include.is_file():
            raise DataError(f"lm-evaluation-harness has no {include}; install the version that deltakeeper asks for.")
        config = {
            "include": str(include),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "num_fewshot": count,
            **changes,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        names[name] = count
    return names


def _write_rows(file: Path, rows: tuple[dict[str, Any], ...]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)
