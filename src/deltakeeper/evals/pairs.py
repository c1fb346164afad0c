"""A user's training pairs: prompts with answers, from CSV, JSONL or JSON, checked by hash before they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.prompts import CATEGORY_COLUMNS, PROMPT_COLUMNS, PromptRow, read_records

ANSWER_COLUMNS = ("answer", "output", "response", "completion", "target")
MAX_ROWS = 1_000_000
MAX_CHARACTERS = 100_000
"""Of one prompt or answer; longer ones are no exchange to learn."""


def load_pairs(path: str | Path, *, sha256: str | None = None) -> list[PromptRow]:
    """Read pairs of prompt and answer; all get the split `train`, equal pairs get ids of their own.

    Columns are found by common names (`prompt`, `instruction`, `question`, …; `answer`, `output`, `response`, …); a
    non-empty `input` is put below an `instruction` (Alpaca), and a record of `messages` gives its last user's and
    assistant's text.

    Args:
        path: the file; its ending decides the form.
        sha256: refuse the file if its hash differs.

    Raises:
        DataError: the file is missing, too large, empty, of another hash, or a record has no prompt or no answer.
    """
    rows: list[PromptRow] = []
    seen: dict[str, int] = {}
    for number, record in read_records(path, sha256=sha256):
        where = f"{path}, line {number},"
        prompt, answer = _exchange(record, where)
        for name, text in (("prompt", prompt), ("answer", answer)):
            if not text.strip():
                raise DataError(f"{where} has an empty {name}; fill or remove it.")
            if len(text) > MAX_CHARACTERS:
                raise DataError(f"{where} has {name} of {len(text)} characters; cut it to {MAX_CHARACTERS}.")
        if len(rows) == MAX_ROWS:
            raise DataError(f"{path} holds more than {MAX_ROWS} rows; take a part of it.")
        digest = hashlib.sha256(f"{prompt}\0{answer}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        category = _first(record, CATEGORY_COLUMNS) or "all"
        rows.append(PromptRow(name, category, "train", prompt.strip(), answer=answer.strip()))
    if not rows:
        raise DataError(f"{path} holds no pairs; check the file.")
    return rows


def _exchange(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    if isinstance(record.get("messages"), list):
        return _of_messages(record["messages"], where)
    prompt, answer = _first(record, PROMPT_COLUMNS), _first(record, ANSWER_COLUMNS)
    if prompt is None or answer is None:
        columns = ", ".join(sorted(map(str, record)))
        missing, known = ("prompt", PROMPT_COLUMNS) if prompt is None else ("answer", ANSWER_COLUMNS)
        raise DataError(f"{where} has no {missing} (one of {', '.join(known)}); it has: {columns}.")
    context = _first(record, ("input",)) if _first(record, ("instruction",)) == prompt else None
    return (f"{prompt}\n\n{context}" if context and context.strip() else prompt), answer


def _of_messages(messages: list[Any], where: str) -> tuple[str, str]:
    last: dict[str, str] = {}
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where} has a message without text; give every message a role and a content.")
        last[str(message.get("role"))] = message["content"]
    if not {"user", "assistant"} <= set(last):
        raise DataError(f"{where} has messages without a user or an assistant; give both.")
    return last["user"], last["assistant"]


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    by_name = {str(name).strip().casefold(): value for name, value in record.items()}
    return next((str(by_name[name]) for name in names if by_name.get(name) is not None), None)
