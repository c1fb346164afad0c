"""Errors that cross from a replica to the ingress, each as the class that routes know."""

from __future__ import annotations

from deltakeeper import errors
from deltakeeper.engine.request import QueueFullError
from deltakeeper.errors import DeltakeeperError, EngineError
from deltakeeper.service.cluster.messages import Failure, Told
from deltakeeper.service.errors import Refused, ServiceError, Unavailable

_KNOWN: dict[str, type[DeltakeeperError]] = {
    kind.__name__: kind
    for kind in (*vars(errors).values(), QueueFullError, Refused, Unavailable)
    if isinstance(kind, type) and issubclass(kind, DeltakeeperError)
}


class ReplicaLostError(EngineError):
    """What answered died, or the node that it ran on did."""


def failure_of(error: DeltakeeperError, told: Told | None = None) -> Failure:
    """An error as it travels."""
    retry_after = error.retry_after if isinstance(error, ServiceError) else None
    return Failure(type(error).__name__, str(error), told, retry_after)


def error_of(failure: Failure) -> DeltakeeperError:
    """The same at the other end; a class that routes do not know becomes an EngineError."""
    kind = _KNOWN.get(failure.kind, EngineError)
    if issubclass(kind, ServiceError):
        return kind(failure.message, retry_after=failure.retry_after)
    return kind(failure.message)
