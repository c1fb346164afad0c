"""Errors of the service, each with the status and the type that OpenAI's clients know."""

from __future__ import annotations

from typing import Any

from deltakeeper.errors import DeltakeeperError


class ServiceError(DeltakeeperError):
    """An error that has an answer in OpenAI's shape.

    Attributes:
        status: of HTTP.
        kind: `error.type`.
        param: the parameter at fault, None if there is none.
        code: `error.code`, None if there is none.
        retry_after: seconds after which it may work; None where trying again does not help.
    """

    status = 400
    kind = "BadRequestError"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.retry_after = param, code, retry_after

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(ServiceError):
    """A parameter that is missing, malformed or out of range."""


class Unauthorized(ServiceError):
    """No key, or none that is known."""

    status, kind = 401, "AuthenticationError"


class Forbidden(ServiceError):
    """A key that may not do this."""

    status, kind = 403, "PermissionDeniedError"


class NotFound(ServiceError):
    """There is no such thing, or not for this key: both say the same."""

    status, kind = 404, "NotFoundError"


class Conflict(ServiceError):
    """The name is taken by something else."""

    status, kind = 409, "ConflictError"


class TooLarge(ServiceError):
    """More bytes than there is room for, or than a request may have."""

    status, kind = 413, "RequestTooLargeError"


class Refused(ServiceError):
    """A delta that policy or its own files keep out."""

    status, kind = 422, "UnprocessableEntityError"


class TooManyRequests(ServiceError):
    """This holder's quota; others are not affected."""

    status, kind = 429, "RateLimitError"


class Unavailable(ServiceError):
    """The engine is full, starting, or about to stop."""

    status, kind = 503, "ServiceUnavailableError"
