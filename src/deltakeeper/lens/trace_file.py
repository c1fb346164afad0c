"""A trace as a JSON file: compact, the same bytes for the same trace, and read as something a stranger wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_json import from_json, to_json
from deltakeeper.whole_files import write_atomically

MOST_BYTES = 64 << 20


def write_trace(trace: LensTrace, path: Path) -> None:
    """Write a trace under a temporary name and put it in place whole.

    Raises:
        DataError: the file cannot be written.
    """
    text = json.dumps(to_json(trace), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    try:
        write_atomically(path, text + "\n")
    except OSError as error:
        raise DataError(
            f"the lens trace cannot be written to {path} ({error.strerror}); give another folder."
        ) from error


def read_trace(path: Path) -> LensTrace:
    """Read a trace strictly: sizes are checked before arrays are made, and nothing unknown is let through.

    Raises:
        DataError: there is no such file, it is larger than 64 MiB, of another version, or not a trace.
    """
    if not path.is_file():
        raise DataError(f"there is no lens trace {path}; give the .json file that a lens run wrote.")
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} is larger than {MOST_BYTES >> 20} MiB; no lens trace is.")
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MOST_BYTES + 1).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8; trace it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return from_json(value, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found
