"""Benchmarks as files of the user: read, checked, hashed, and brought into the form that their prompts expect."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.utility.rows import Row, json_rows, number_of, one_of, read_text, some_rows, text_of


@dataclass(frozen=True)
class TaskData:
    """Rows of a benchmark.

    Attributes:
        rows: what is asked.
        strata: subject or category of each row; empty strings where there is none.
        shots: rows for few-shot examples; empty where none are given.
        sources: SHA-256 of each file that was read, by path.
    """

    rows: tuple[Row, ...]
    strata: tuple[str, ...]
    shots: tuple[Row, ...]
    sources: dict[str, str]


def read_gsm8k(path: Path) -> TaskData:
    """GSM8K (arXiv 2110.14168): `question` and `answer` with `#### number`.

    Args:
        path: a `.jsonl` file, or a folder with `test.jsonl`; a `train.jsonl` beside it gives few-shot examples.
    """
    file = one_of(path, "test.jsonl")
    train = file.with_name("train.jsonl")
    sources: dict[str, str] = {}
    rows = [_gsm8k(row, where) for row, where in json_rows(file, sources)]
    shots = [_gsm8k(row, where) for row, where in json_rows(train, sources)] if train.is_file() else []
    return TaskData(tuple(rows), ("",) * len(rows), tuple(shots), sources)


def read_mmlu(path: Path) -> TaskData:
    """MMLU (arXiv 2009.03300): `subject`, `question`, four `choices`, and `answer` from 0 to 3.

    Args:
        path: a `.jsonl` file, or a folder with just one.
    """
    sources: dict[str, str] = {}
    rows: list[Row] = []
    for row, where in json_rows(one_of(path, "*.jsonl"), sources):
        choices: Any = row.get("choices")
        if not isinstance(choices, list) or len(choices) != 4:
            raise DataError(f"{where} does not have four 'choices'; give them as a list of texts.")
        rows.append(
            {
                "subject": text_of(row, "subject", where),
                "question": text_of(row, "question", where),
                "choices": [text_of({"choice": choice}, "choice", where) for choice in choices],
                "answer": number_of(row, "answer", 4, where),
            }
        )
    return TaskData(tuple(rows), tuple(row["subject"] for row in rows), (), sources)


def read_piqa(path: Path) -> TaskData:
    """PIQA (arXiv 1911.11641): `goal`, `sol1`, `sol2`, and `label` 0 or 1 in the row or on a line of its own file.

    Args:
        path: a `.jsonl` file, or a folder with `valid.jsonl`. Where its rows have no `label`, the lines of
            `<name>-labels.lst` beside it are theirs.
    """
    file = one_of(path, "valid.jsonl")
    sources: dict[str, str] = {}
    rows = list(json_rows(file, sources))
    beside = file.with_name(f"{file.stem}-labels.lst")
    if rows and "label" not in rows[0][0] and beside.is_file():
        labels = read_text(beside, sources).split()
        if len(labels) != len(rows):
            raise DataError(f"{beside} has {len(labels)} labels for {len(rows)} rows of {file}; get both files again.")
        rows = [(row | {"label": label}, where) for (row, where), label in zip(rows, labels, strict=True)]
    found: tuple[Row, ...] = tuple(
        {key: text_of(row, key, where) for key in ("goal", "sol1", "sol2")}
        | {"label": number_of(row, "label", 2, where)}
        for row, where in rows
    )
    return TaskData(found, ("",) * len(found), (), sources)


_TRUTHFUL = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")


def read_truthfulqa(path: Path) -> TaskData:
    """TruthfulQA (arXiv 2109.07958) as its CSV; the choices are built from its lists of answers.

    For `mc1` the best answer stands against the incorrect ones, for `mc2` the correct ones (the best one first)
    against the incorrect ones. The published multiple-choice file was edited by hand, so scores are near its own, not
    equal to them.

    Args:
        path: the CSV, or a folder with `TruthfulQA.csv`.
    """
    file = one_of(path, "TruthfulQA.csv")
    sources: dict[str, str] = {}
    table = csv.DictReader(io.StringIO(read_text(file, sources), newline=""))
    if missing := [name for name in _TRUTHFUL if name not in (table.fieldnames or ())]:
        raise DataError(f"{file} has no column '{missing[0]}'; give TruthfulQA.csv as published.")
    rows, strata = [], []
    try:
        lines = list(table)
    except csv.Error as error:
        raise DataError(f"{file} is not CSV ({error}); get it again.") from error
    for number, line in enumerate(lines, 2):
        where = f"row {number} of {file}"
        best = text_of(line, "Best Answer", where).strip()
        wrong = _answers(line, "Incorrect Answers", where)
        right = list(dict.fromkeys([best, *_answers(line, "Correct Answers", where)]))
        wrong = [answer for answer in wrong if answer not in right]
        if not wrong:
            raise DataError(f"{where} has no incorrect answer of its own; get the file again.")
        rows.append(
            {
                "question": text_of(line, "Question", where).strip(),
                "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
                "mc2_targets": {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)},
            }
        )
        strata.append(text_of(line, "Category", where))
    return TaskData(some_rows(rows, file), tuple(strata), (), sources)


def read_passages(path: Path, characters: int = 1000) -> TaskData:
    """Passages of a plain text (`text` each): paragraphs, put together until they have so many characters.

    Args:
        path: a `.txt` file.
        characters: least length of a passage; the last one may be shorter.
    """
    sources: dict[str, str] = {}
    text = read_text(one_of(path, "*.txt"), sources)
    passages, parts = [], list[str]()
    for part in (piece.strip() for piece in re.split(r"\n\s*\n", text)):
        parts += [part] if part else []
        if sum(map(len, parts)) >= characters:
            passages.append("\n\n".join(parts))
            parts = []
    passages += ["\n\n".join(parts)] if parts else []
    rows = [{"text": passage} for passage in passages]
    return TaskData(some_rows(rows, path), ("",) * len(rows), (), sources)


def _gsm8k(row: Row, where: str) -> Row:
    found = {key: text_of(row, key, where) for key in ("question", "answer")}
    if "#### " not in found["answer"]:
        raise DataError(f"the answer in {where} does not end in '#### ' and a number; give GSM8K as published.")
    return found


def _answers(line: Row, key: str, where: str) -> list[str]:
    parts = (part.strip() for part in text_of(line, key, where).split(";"))
    return list(dict.fromkeys(part for part in parts if part))
