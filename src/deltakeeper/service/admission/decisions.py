"""The log of decisions: lines of JSON that are only ever appended, each with the hash of the one before."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from deltakeeper.errors import DataError
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.errors import Unavailable
from deltakeeper.service.guard import require

KEPT = 1000
"""Latest decisions that are kept in memory to be asked for; all of them are in the file."""
_START = "0" * 64
_RETRY_SECONDS = 5.0


class DecisionLog:
    """Decisions on disk, written through before they count; safe on any thread, one process at a time.

    A line is an object of `number`, `at` (UTC), `policy` (hash of the policy file), the fields of a `Decision`, and
    `previous`, the SHA-256 of the line before without its end. A changed or missing line breaks the chain, which
    `read_log` finds; one who can write the file could write all of it anew, so keep a copy of the last hash elsewhere
    where that matters.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Open a log, or begin one.

        Args:
            path: the file.
            now: the clock.

        Raises:
            DataError: the file cannot be written, is none, or another process writes it.
        """
        self._now = now
        self._lock = threading.Lock()
        self._recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._last: dict[str, Decision] = {}
        self._counts: Counter[str] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"decisions cannot be logged in {path} ({error.strerror}); give another file.") from error
        self._previous, self._number = _START, 0
        try:
            self._take_up(path)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, decision: Decision, policy: str) -> bool:
        """Log a decision, unless it says the same of its tenant as the last one; whether it was written.

        Args:
            decision: what was decided.
            policy: hash of the policy file.

        Raises:
            Unavailable: it could not be written, so nothing was decided.
        """
        with self._lock:
            if self._last.get(decision.name) == decision:
                return False
            at = self._now().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            entry = {"number": self._number + 1, "at": at, "policy": policy, **asdict(decision)}
            line = json.dumps({**entry, "previous": self._previous}, ensure_ascii=True, allow_nan=False).encode()
            try:
                self._append(line + b"\n")
            except OSError as error:
                raise Unavailable(
                    f"The decision on '{decision.name}' cannot be written down ({error.strerror}), and holds only "
                    "then; ask again when the log of decisions can be written.",
                    retry_after=_RETRY_SECONDS,
                ) from error
            self._previous, self._number = hashlib.sha256(line).hexdigest(), self._number + 1
            self._recent.append(entry)
            self._last[decision.name] = decision
            self._counts[decision.verdict] += 1
            return True

    def counts(self) -> dict[str, int]:
        """Decisions that this process logged, by verdict."""
        with self._lock:
            return dict(self._counts)

    def latest(self, name: str) -> Decision | None:
        """The last decision that this process logged on a tenant."""
        with self._lock:
            return self._last.get(name)

    def recent(self, name: str | None = None, *, limit: int = 100, before: int | None = None) -> list[dict[str, Any]]:
        """Entries, latest first, of the last `KEPT`; arguments as in `Admission.history`."""
        with self._lock:
            entries = list(self._recent)
        found = [e for e in reversed(entries) if name in (None, e["name"]) and (before is None or e["number"] < before)]
        return found[:limit]

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)  # the start of a line would join the next one
            raise

    def _take_up(self, path: Path) -> None:
        """Go on after the last whole line; what follows it was never said to be written."""
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = _checked(line, self._previous, self._number + 1, path)
                whole += len(line)
                self._previous, self._number = hashlib.sha256(line[:-1]).hexdigest(), entry["number"]
                self._recent.append({key: value for key, value in entry.items() if key != "previous"})
        os.ftruncate(self._file, whole)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All entries of a log, oldest first, their chain checked.

    Raises:
        DataError: a line was changed, left out or is no entry.
    """
    found: list[dict[str, Any]] = []
    previous = _START
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                found.append(_checked(line, previous, len(found) + 1, path))
                previous = hashlib.sha256(line[:-1]).hexdigest()
    return found


def _checked(line: bytes, previous: str, number: int, path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        held = entry["previous"] == previous and entry["number"] == number and isinstance(entry["name"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        held = False
    if not held:
        raise DataError(
            f"line {number} of {path} does not follow from the one before: the log was altered; move it away and look."
        )
    return dict(entry)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


router = APIRouter(prefix="/admin", tags=["admission"], dependencies=[require("manage")])


@router.get("/decisions")
def list_decisions(
    request: Request,
    name: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=KEPT)] = 100,
    before: Annotated[int | None, Query(ge=1)] = None,
) -> dict[str, Any]:
    """Decisions on deltas, latest first: all, or those on one tenant, and those before a number."""
    admission = request.app.state.services.admission
    entries = [] if admission is None else list(admission.history(name, limit=limit, before=before))
    return {"object": "list", "data": entries}
