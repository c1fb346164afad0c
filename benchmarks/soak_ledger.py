"""What a soak counts, and what it holds against the service."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_KEPT = 40


@dataclass
class Ledger:
    """Counts by kind; faults with a sentence each, of which the first are kept.

    Attributes:
        began: seconds of `time.monotonic()`.
        requests: by what was asked and what came.
        faults: by kind.
        told: the first of them, as (seconds since the beginning, kind, what happened).
    """

    began: float = field(default_factory=time.monotonic)
    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    told: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def count(self, kind: str, outcome: object) -> None:
        """One request and how it ended."""
        self.requests[f"{kind}: {outcome}"] += 1

    def blame(self, kind: str, what: str) -> None:
        """Something that must not happen."""
        self.faults[kind] += 1
        if len(self.told) < _KEPT:
            self.told.append((round(self.seconds, 1), kind, what[:600]))

    def check_refusal(self, what: str, status: int, headers: Any, body: Any) -> None:
        """An answer that is an error: its shape, and that it says when to come back."""
        if status >= 500 and status != 503:
            self.blame(f"status {status}", f"{what}: {body}")
        fields = body.get("error") if isinstance(body, dict) else None
        if not isinstance(fields, dict) or set(fields) != {"message", "type", "param", "code"}:
            self.blame("an error in another shape", f"{what}: {status} {body}")
        if status in (429, 503) and not headers.get("retry-after", "").isdigit():
            self.blame("no Retry-After", f"{what}: {status} {body}")
