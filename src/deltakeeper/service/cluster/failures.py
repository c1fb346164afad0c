"""Errors that cross from a replica to the ingress, each as the class that routes know."""

from __future__ import annotations

from deltakeeper import errors
from deltakeeper.engine.request import QueueFullError
from deltakeeper.errors import DeltakeeperError, EngineError
from deltakeeper.service.cluster.messages import Failure, Told
from deltakeeper.service.errors import Refused, Unavailable

_KNOWN: dict[str, type[DeltakeeperError]] = {
    kind.__name__: kind
    for kind in (
        errors.ArtifactError,
        errors.BaseMismatchError,
        errors.ChangedError,
        errors.DataError,
        errors.LayoutError,
        errors.OverlayError,
        errors.OversizedError,
        errors.TenantError,
        QueueFullError,
        Refused,
        Unavailable,
    )
}


class ReplicaLostError(EngineError):
    """What answered died, or the node that it ran on did."""


def failure_of(error: DeltakeeperError, told: Told | None = None) -> Failure:
    """An error as it travels."""
    return Failure(type(error).__name__, str(error), told)


def error_of(failure: Failure) -> DeltakeeperError:
    """The same at the other end; a class that routes do not know becomes an EngineError."""
    return _KNOWN.get(failure.kind, EngineError)(failure.message)
