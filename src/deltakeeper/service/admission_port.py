"""What the service asks of admission: may this delta be served, and at which fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

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
    """Lets deltas in by policy. Files are checked before anything is loaded; the canary runs on what was loaded.

    Nothing has to be asked before a request: a delta that is not let in is not loaded, and one whose canary has not
    passed is not given to the engine. Requests wait for that as they wait for a load, and end with the reasons.
    """

    @property
    def max_bytes(self) -> int | None:
        """Most bytes of an artifact; None for any number."""

    def decide(self, name: str, folder: Path) -> Decision:
        """What policy says of an artifact's files, before it is loaded; never raises for a bad one, but refuses it.

        It reads files, all of them where an attestation has to hold: call it on a thread that may wait.

        Raises:
            Unavailable: they cannot be read now, which says nothing of them.
        """

    def settle(self, name: str, seconds: float) -> Decision:
        """Load a tenant that the store knows, see it through its canary, and give the decision; it waits for that.

        Raises:
            Unavailable: nothing was decided within `seconds`, or the canary could not be run.
            OversizedError: it could never be in memory, whatever policy says.
        """

    def admits(self, name: str) -> bool:
        """Whether what a tenant has in memory may be used; false while it is loaded or tried, which is begun. Quick.

        Raises:
            TenantError: it is not let in, or cannot be loaded or tried now.
        """

    def replace(self, name: str, folder: Path, *, planes: int | None = None) -> Future[str]:
        """Load another artifact for a name, see it through its canary, and turn the name over to it if it passes.

        Until then, and if it does not, the name stands for what it did. A future that is cancelled turns nothing over.
        It gives the version, or raises what the load failed with, `Refused` with the reasons, or `Unavailable` where
        the canary could not be run.

        Raises:
            TenantError: the store does not know the name.
        """

    def known(self, name: str, version: str | None = None) -> Decision | None:
        """The decision on a version, or on what a tenant was last asked for; None while there is none. Quick."""

    def history(self, name: str | None = None, *, limit: int = 100, before: int | None = None) -> Sequence[Any]:
        """Logged decisions, latest first, as JSON objects with `number` and `at`.

        Args:
            name: only those on this tenant.
            limit: how many at most.
            before: only those with a smaller number.
        """
