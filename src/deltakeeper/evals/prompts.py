"""Prompt sets: the package's own, and any CSV, JSONL, JSON or hub set in their place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from deltakeeper.errors import DataError

Packaged = Literal["harmful", "instructions", "tickets", "passages", "coding", "facts", "persona", "topics"]
MAX_BYTES = 256 << 20
PROMPT_COLUMNS = ("prompt", "goal", "behavior", "forbidden_prompt", "instruction", "question", "text")
CATEGORY_COLUMNS = ("category", "semantic_category", "semanticcategory", "type", "subject")


@dataclass(frozen=True)
class PromptRow:
    """One prompt with its category and split; `twin` is a harmless look-alike, `answer` the expected answer.

    Splits of the package's sets: `train`, `heldout`, and `heldout2`, which is held out too and comes after `heldout`,
    so that a study of fewer prompts asks what it asked before there were more.
    """

    id: str
    category: str
    split: str
    prompt: str
    twin: str | None = None
    answer: str | None = None


def load_packaged(name: Packaged, split: str | None = None) -> list[PromptRow]:
    """One of the package's own sets, or one split of it; passages carry their text as the prompt."""
    if name not in get_args(Packaged):
        raise DataError(f"there is no packaged set '{name}'; choose among {', '.join(get_args(Packaged))}.")
    text = (files("deltakeeper") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = list(_rows(_json_lines(text, name), f"packaged set '{name}'", None, None))
    return [row for row in rows if split is None or row.split == split]


def load_file(
    path: str | Path,
    *,
    prompt_column: str | None = None,
    category_column: str | None = None,
    sha256: str | None = None,
) -> list[PromptRow]:
    """Read a user's prompt set: CSV (with a header, or one bare column as AdvBench), JSONL, or a JSON list.

    Args:
        path: the file; its ending decides the form.
        prompt_column: column of the prompts; guessed from common names if not given.
        category_column: column of the categories; guessed likewise, else every row is of category `all`.
        sha256: refuse the file if its hash differs.

    Raises:
        DataError: the file is missing, too large, empty, of another hash, or has no such column.
    """
    records = read_records(path, prompt_column=prompt_column, sha256=sha256)
    return list(_rows(records, str(path), prompt_column, category_column))


def read_records(
    path: str | Path, *, prompt_column: str | None = None, sha256: str | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbered records of a CSV, JSONL or JSON file, checked for size, hash and form; raises as `load_file` does."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no prompt file at {path}; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than 256 MiB, which no prompt set is; check the path.")
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise DataError(f"{path} has sha256 {found}, not {sha256}; get the file that was asked for.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _json_lines(text, str(path))
    if path.suffix.lower() == ".json":
        return _json_list(text, str(path))
    return _csv_records(text, str(path), prompt_column)


def load_prompts(source: str | Path) -> list[PromptRow]:
    """Load a packaged set by name, a file by path, or `hf:organisation/dataset:split` from the hub.

    Raises:
        DataError: the source cannot be read, or `datasets` is not installed for a hub set.
    """
    text = str(source)
    if text in get_args(Packaged):
        return load_packaged(text)  # type: ignore[arg-type]
    if not text.startswith("hf:"):
        return load_file(text)
    name, _, split = text.removeprefix("hf:").partition(":")
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DataError(f"reading {text} needs the package datasets; run `pip install datasets`.") from error
    try:
        records = enumerate(datasets.load_dataset(name, split=split or "test"), start=1)
    except Exception as error:
        raise DataError(f"{text} cannot be loaded ({error}); check the name, the split and the network.") from error
    return list(_rows(records, text, None, None))


def _csv_records(text: str, where: str, prompt_column: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = text.splitlines(keepends=True)
    comments = 0
    while comments < len(lines) and lines[comments].startswith("# "):
        comments += 1
    rows = csv.reader(io.StringIO("".join(lines[comments:]), newline=""))
    try:
        header = next(rows, None)
        if header is None:
            return
        names = (*PROMPT_COLUMNS, prompt_column.casefold()) if prompt_column else PROMPT_COLUMNS
        if len(header) == 1 and header[0].strip().casefold() not in names:
            yield comments + 1, {"prompt": header[0]}  # a bare list of prompts has no header
            header = ["prompt"]
        for row in rows:
            if row:
                padded = row + [""] * (len(header) - len(row))  # a short row has empty cells, not fewer columns
                yield comments + rows.line_num, dict(zip(header, padded, strict=False))
    except csv.Error as error:
        raise DataError(f"{where}, line {comments + rows.line_num}, is not CSV ({error}); correct it.") from error


def _json_lines(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028, which JSON allows
        if line.strip():
            yield number, _object(_parse(line, f"{where}, line {number},"), f"{where}, line {number},")


def _json_list(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    value = _parse(text, where)
    if not isinstance(value, list):
        raise DataError(f"{where} is not a JSON list; give a list of objects or of texts.")
    for number, item in enumerate(value, start=1):
        yield number, {"prompt": item} if isinstance(item, str) else _object(item, f"{where}, item {number},")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); correct it.") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object; give one object a prompt.")
    return value


def _rows(
    records: Iterable[tuple[int, Mapping[str, Any]]], where: str, prompt_column: str | None, category_column: str | None
) -> Iterator[PromptRow]:
    number = 0
    seen: set[str] = set()
    for number, record in records:
        prompt = _pick(record, prompt_column, PROMPT_COLUMNS, where)
        if prompt is None or not str(prompt).strip():
            raise DataError(f"{where}, line {number}, has an empty prompt; fill or remove it.")
        category = _pick(record, category_column, CATEGORY_COLUMNS, where, optional=category_column is None)
        digest = hashlib.sha256(str(prompt).encode()).hexdigest()[:12]
        name = str(digest if record.get("id") in (None, "") else record["id"])
        if name in seen:
            raise DataError(
                f"{where}, line {number}, repeats the prompt or id '{name}'; answers are paired by id, so remove it."
            )
        seen.add(name)
        yield PromptRow(
            id=name,
            category=str(category or "all"),
            split=str(record.get("split") or "heldout"),
            prompt=str(prompt).strip(),
            twin=_optional(record.get("twin")),
            answer=_optional(record.get("answer")),
        )
    if number == 0:
        raise DataError(f"{where} holds no prompts; check the file.")


def _pick(
    record: Mapping[str, Any], wanted: str | None, known: tuple[str, ...], where: str, optional: bool = False
) -> Any:
    by_name = {str(name).strip().casefold(): value for name, value in record.items()}
    for name in [wanted.casefold()] if wanted else known:
        if name in by_name:
            return by_name[name]
    if optional:
        return None
    columns = ", ".join(sorted(map(str, record)))
    asked = f"column '{wanted}'" if wanted else f"prompt column (one of {', '.join(known)})"
    raise DataError(f"{where} has no {asked}; it has: {columns}.")


def _optional(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
