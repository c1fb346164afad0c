"""What the service asks of admission: may this delta be served, and at which fidelity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Verdict = Literal["admitted", "quarantined", "refused"]


@dataclass(frozen=True)
class Decision:
    """One decision about a delta.

    Attributes:
        name: of the tenant.
        verdict: `quarantined` is served at a lower fidelity.
        planes: sign planes that may be served; None for all.
        reasons: sentences, at least one where it is not plainly admitted.
        manifest_sha256: of the artifact that was looked at; None where it could not be read.
        canary: what the probe set said, by number; empty where none was run.
    """

    name: str
    verdict: Verdict
    planes: int | None = None
    reasons: tuple[str, ...] = ()
    manifest_sha256: str | None = None
    canary: dict[str, float] | None = None


class Admission(Protocol):
    """Lets deltas in by policy. Files are checked before anything is loaded; the canary runs on what was loaded."""

    def decide(self, name: str, folder: Path) -> Decision:
        """What policy says of an artifact, before it is loaded; never raises for a bad artifact, but refuses it."""
