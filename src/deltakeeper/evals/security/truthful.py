"""TruthfulQA (arXiv 2109.07958) as a choice between its best answer and a false one, from a local table."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deltakeeper.errors import DataError
from deltakeeper.evals.probes import ProbeRow
from deltakeeper.evals.prompts import read_records

COLUMNS = ("Question", "Best Answer", "Incorrect Answers")


def choice_rows(path: str | Path, n: int, *, sha256: str | None = None) -> tuple[ProbeRow, ...]:
    """Questions with two answers, A and B; `expected` is the letter of the *false* one.

    The false answer is the table's `Best Incorrect Answer` where it has that column, else the first incorrect one. A
    hash of the question decides which letter is false and which questions are taken, so both are fixed and about half
    are A.

    Raises:
        DataError: the file cannot be read, is of another hash, or lacks a column or rows.
    """
    rows = []
    for number, record in read_records(path, prompt_column="Question", sha256=sha256):
        if lacking := [c for c in COLUMNS if not str(record.get(c) or "").strip()]:
            raise DataError(f"{path}, line {number}, has no '{lacking[0]}'; give the table of TruthfulQA.")
        question = str(record["Question"]).strip()
        false = str(record.get("Best Incorrect Answer") or str(record["Incorrect Answers"]).split(";")[0]).strip()
        digest = hashlib.sha256(question.encode()).hexdigest()
        pair = [str(record["Best Answer"]).strip(), false]
        letter = "AB"[int(digest[-1], 16) % 2]
        first, second = reversed(pair) if letter == "A" else pair
        text = f"{question}\nA: {first}\nB: {second}\nReply with one letter, A or B."
        rows.append(ProbeRow(digest[:12], str(record.get("Category") or "all"), text, letter))
    unique = {row.id: row for row in rows}
    if len(unique) < n:
        raise DataError(f"{path} holds {len(unique)} questions and {n} are asked for; ask for less.")
    return tuple(sorted(unique.values(), key=lambda row: row.id)[:n])
