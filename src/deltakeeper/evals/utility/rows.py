"""Rows of files that a user gives: read within limits, hashed, and checked field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError

MOST_BYTES = 256 << 20
MOST_ROWS = 200_000
MOST_CHARACTERS = 100_000
"""Longest text of one field."""

Row = dict[str, Any]


def one_of(path: Path, pattern: str) -> Path:
    """The file itself, or the one in a folder that is called so; raises DataError if there is not just one."""
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if len(found) != 1:
            raise DataError(f"{path} holds {len(found)} files {pattern}; give the path of the file.")
        return found[0]
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}; check the path.")
    return path


def read_text(file: Path, sources: dict[str, str]) -> str:
    """Text of a file whose SHA-256 goes into `sources`; raises DataError if it is too large or not UTF-8."""
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file} is larger than {MOST_BYTES >> 20} MiB, which no benchmark is; check the path.")
    raw = file.read_bytes()
    sources[str(file)] = hashlib.sha256(raw).hexdigest()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); convert it first.") from error


def json_rows(file: Path, sources: dict[str, str]) -> Iterator[tuple[Row, str]]:
    """Objects of JSON lines, each with what it is called in errors; raises DataError if a line is something else."""
    count = 0
    for number, line in enumerate(read_text(file, sources).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON; write one object a line.") from error
        count += 1
        if not isinstance(row, dict) or count > MOST_ROWS:
            raise DataError(f"{where} is not one of at most {MOST_ROWS:,} objects; check the file.")
        yield row, where
    if not count:
        raise DataError(f"{file} holds no rows; check the file.")


def some_rows(rows: list[Row], file: Path) -> tuple[Row, ...]:
    """Rows of a file; raises DataError if there are none or too many."""
    if not 0 < len(rows) <= MOST_ROWS:
        raise DataError(f"{file} holds {len(rows):,} rows; give 1 to {MOST_ROWS:,}.")
    return tuple(rows)


def text_of(row: Row, key: str, where: str) -> str:
    """A text of a row; raises DataError if it is absent, blank or too long."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_CHARACTERS:
        raise DataError(f"{where} has no text of at most {MOST_CHARACTERS:,} characters as '{key}'; check the file.")
    return value


def number_of(row: Row, key: str, below: int, where: str) -> int:
    """A number from 0 to `below - 1` of a row, which may be spelled as text; raises DataError if it is none."""
    value = row.get(key)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 <= value < below:
        raise DataError(f"{where} has {value!r:.40} as '{key}'; give a number from 0 to {below - 1}.")
    return value
