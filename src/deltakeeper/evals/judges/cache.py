"""Replies of judging models on disk, by the digest of what was asked: a run that is repeated costs nothing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from deltakeeper.evals.judges.settings import MAX_BYTES

_VERSION = 1


class ReplyCache:
    """A folder of replies, `ab/abcd….json`; safe for threads and processes, since a file is written whole or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> str | None:
        """The reply to a request by its digest; None if there is none, or what lies there cannot be trusted."""
        path = self._path(key)
        try:
            if path.stat().st_size > MAX_BYTES:
                return None
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if isinstance(value, dict) and value.get("version") == _VERSION and value.get("key") == key:
            reply = value.get("reply")
            return reply if isinstance(reply, str) else None
        return None

    def put(self, key: str, reply: str) -> None:
        """Keep a reply: written under a temporary name, then renamed."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": _VERSION, "key": key, "reply": reply}, indent=1, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
