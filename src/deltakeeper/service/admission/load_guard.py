"""The guard in front of the overlay: whatever asks for a load, policy sees the files first and sets the planes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from deltakeeper.artifact import DeltaArtifact, hash_manifest
from deltakeeper.engine.tenant_records import Delta, TenantOverlay
from deltakeeper.errors import ChangedError, DeltakeeperError, is_lasting
from deltakeeper.overlay.loading import version_of
from deltakeeper.service.admission.inspection import Finding, stored_planes, undimmed
from deltakeeper.service.admission.standing import Load, Standing
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.errors import Refused


class Inspector(Protocol):
    """What the guard asks before a load."""

    def look_at(self, artifact: DeltaArtifact, version: str) -> Finding:
        """What policy says of files; `version` is the content at the planes that were asked for."""

    def log_refusal(self, decision: Decision) -> None:
        """Write down that they were refused."""


def not_admitted(name: str) -> str:
    """What whoever asks a refused delta is told: reasons may name paths, and are for those who run the service."""
    return f"The model '{name}' is not admitted; the log of decisions says why."


class LoadGuard:
    """An overlay that loads what policy lets in; it runs on the store's loader threads."""

    def __init__(self, overlay: TenantOverlay, inspector: Inspector, standing: Standing) -> None:
        self._overlay, self._inspector, self._standing = overlay, inspector, standing

    def load(self, artifact: DeltaArtifact, *, planes: int | None = None) -> Delta:
        """Read a delta at no more planes than policy allows.

        Raises:
            Refused: policy or an earlier canary keeps it out, or its files changed while they were looked at.
            ChangedError: it failed, and its name has other files now or none.
            DeltakeeperError: what the overlay says; where that lasts it is logged as a refusal too.
        """
        whole = version_of(artifact, planes)
        finding = self._inspector.look_at(artifact, whole)
        stored = stored_planes(artifact)
        served = planes
        if finding.planes is not None and finding.planes < (stored if planes is None else planes):
            served = finding.planes
        expected = whole if served == planes else version_of(artifact, served)
        with self._standing.lock:
            earlier = self._standing.refused.get(expected)
        name = getattr(artifact, "tenant", None) or artifact.path.name
        if finding.verdict == "refused":
            earlier = Decision(name, "refused", None, finding.reasons, artifact.manifest_sha256)
        if earlier is not None:
            self._inspector.log_refusal(replace(earlier, name=name))
            raise Refused(not_admitted(name), code="not_admitted")
        try:
            delta = self._overlay.load(artifact, planes=served)
        except DeltakeeperError as error:
            if not is_lasting(error):
                raise
            if hash_manifest(artifact.path) != artifact.manifest_sha256:  # and nothing is known of what lies there now
                raise ChangedError(f"{artifact.path} was taken away or replaced while it was loaded.") from error
            reasons = (*finding.reasons, str(error))
            self._inspector.log_refusal(Decision(name, "refused", None, reasons, artifact.manifest_sha256))
            raise
        if delta.version != expected:
            delta.close()
            raise Refused(f"{artifact.path.name} changed while it was loaded; load it again.", code="not_admitted")
        with self._standing.lock:
            self._standing.loads[expected] = Load(
                whole=whole,
                path=artifact.path,
                asked=planes,
                served=stored if served is None else served,
                dimmable=undimmed(artifact) is None,
                manifest_sha256=artifact.manifest_sha256,
                finding=finding,
            )
        return delta

    def publish(self, delta: Any, /) -> int:
        """As the overlay does."""
        return self._overlay.publish(delta)

    def retire(self, slot: int, /) -> Delta:
        """As the overlay does."""
        return self._overlay.retire(slot)
