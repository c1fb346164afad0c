"""Errors as OpenAI's JSON: those of the service, of the engine, of routes and of input."""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deltakeeper.engine.request import QueueFullError
from deltakeeper.errors import DataError, EngineError
from deltakeeper.service.errors import BadRequest, ServiceError, Unavailable

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}
_FORM = re.compile(r"(constrained-)?(str|int)|list\[.*\]")
"""How pydantic names the forms that a field may have, in the middle of the way to what is wrong."""


class ErrorFields(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


def add_error_answers(app: FastAPI) -> None:
    """Let an application answer errors in OpenAI's shape; what nobody foresaw is the `Doorway`'s."""
    app.add_exception_handler(ServiceError, _answer_service_error)
    app.add_exception_handler(EngineError, _answer_engine_error)
    app.add_exception_handler(DataError, _answer_data_error)
    app.add_exception_handler(RequestValidationError, _answer_bad_input)
    app.add_exception_handler(HTTPException, _answer_http_exception)


def error_response(error: ServiceError) -> JSONResponse:
    """The answer to an error of the service; `Retry-After` is in whole seconds, at least one."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_json(), error.status, headers)


def status_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer to an error that only has a status."""
    kind = _KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers)


def service_error_of(error: EngineError, retry_seconds: float = 1.0) -> ServiceError:
    """What an error of the engine means to whoever asked."""
    if isinstance(error, QueueFullError):
        return Unavailable(f"The engine is full: {error}", code="queue_full", retry_after=retry_seconds)
    return BadRequest(str(error))


def describe_input_error(entry: Any) -> tuple[str, str | None]:
    """A sentence about one entry of pydantic's list of errors, and the parameter at fault."""
    where = [str(part) for part in entry["loc"] if part not in ("body", "query", "path", "header")]
    named = [part for part in where if not _FORM.fullmatch(part)]
    if entry["type"] == "json_invalid":
        return "The body is not JSON; send a JSON object.", None
    name = ".".join(named)
    if named != where:  # one of several forms, and pydantic speaks of the first
        return f"{name[:200]} has none of the forms that it may have; see /openapi.json.", name[:200]
    if entry["type"] == "missing" and name:
        return f"{name[:200]} is missing; give it.", name[:200]
    message = str(entry["msg"]).removeprefix("Value error, ").rstrip(".")
    if not name:
        return f"The body is refused: {message[:1].lower()}{message[1:]}.", None
    return f"{name[:200]} is refused: {message[:1].lower()}{message[1:]}.", name[:200]


async def _answer_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error)


async def _answer_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return error_response(service_error_of(error))


async def _answer_data_error(request: Request, error: Exception) -> Response:
    return error_response(BadRequest(str(error)))


async def _answer_bad_input(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe_input_error(error.errors()[0])
    return error_response(BadRequest(message, param=param))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return status_response(error.status_code, str(error.detail), dict(error.headers or {}))
