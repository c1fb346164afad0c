"""The door of the service: limits, request ids, and a closed table of what may be called by whom.

It stands before the framework, so that a caller is known and counted before a byte of the body is read, and so that a
route which is not in the table does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from h11 import LocalProtocolError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltakeeper.errors import is_failure
from deltakeeper.loopback import is_loopback
from deltakeeper.service.access import Gate, Principal
from deltakeeper.service.error_answers import error_response, status_response
from deltakeeper.service.errors import ServiceError, TooManyRequests
from deltakeeper.service.guard import Kind, guarded_routes, is_upload, let_in
from deltakeeper.service.running import Observer, Tracer
from deltakeeper.service.settings import ServiceSettings

_log = logging.getLogger("deltakeeper.service")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_PROBES = ("/health", "/ready", "/ping")
_JSON = re.compile(r"\s*application/([^;\s]+\+)?json\s*(;.*)?", re.IGNORECASE)
_CLOSING_SECONDS = 5.0
"""How long a client may take to let go of a connection that was closed, before the server complains."""
_UNFORESEEN = "The service failed in a way that it does not know; its log says how, under this request id."


class Doorway:
    """ASGI middleware around an application whose routes all declare a guard.

    Args:
        app: what is behind the door.
        routes: those of the application.
        gate: identifies callers.
        settings: limits of headers and bodies.
        context: most tokens of a prompt, for which a body must have room.
        traces: told of every request; None where nobody traces.
        metrics: told of requests that quotas keep out; None where nobody measures.

    Raises:
        RouteError: a route does not say who may call it.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[Any],
        gate: Gate,
        settings: ServiceSettings,
        traces: Tracer | None = None,
        metrics: Observer | None = None,
        context: int = 0,
    ) -> None:
        json = settings.body_bytes(context), settings.max_body_objects
        self._app, self._gate, self._settings, self._traces = app, gate, settings, traces
        self._metrics = metrics
        self._table: list[tuple[re.Pattern[str], frozenset[str], Kind, tuple[int, int | None]]] = [
            (
                route.path_regex,
                frozenset(route.methods),
                kind,
                (settings.max_upload_bytes, None) if is_upload(route) else json,
            )
            for route, kind in guarded_routes(routes)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; WebSockets are not spoken."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        visit = _Visit(scope, send, _request_id(scope))
        scope.setdefault("state", {})["request_id"] = visit.id
        with self._traced(scope, visit):
            try:
                answer = self._stopped(scope)
                if answer is not None:
                    await answer(scope, receive, visit.send)
                else:
                    most, objects = scope["state"]["limits"]
                    await self._app(scope, _Body(receive, most, objects), visit.send)
            except LocalProtocolError:  # what followed the head was no HTTP, which uvicorn has answered by itself
                _log.info("request %s: its body is no HTTP; the connection was closed", visit.id)
                await _wait_for_end(receive)
            except BaseException as error:
                if not is_failure(error):
                    raise
                _log.exception("request %s: %s %s failed", visit.id, scope["method"], _printable(scope["path"]))
                if not visit.status:
                    await status_response(500, _UNFORESEEN)(scope, receive, visit.send)
            finally:
                visit.log()

    def _traced(self, scope: Scope, visit: _Visit) -> AbstractContextManager[None]:
        if self._traces is None:
            return nullcontext()
        return self._traces.visit(scope, visit.id, lambda: visit.status)

    def _stopped(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that does not get in."""
        length, chunked = _header(scope, b"content-length"), _header(scope, b"transfer-encoding") is not None
        if length is not None and chunked:  # a proxy may end the request elsewhere, and what follows be another's
            told = "The body has a Content-Length and a Transfer-Encoding; send one of them."
            return status_response(400, told, {"Connection": "close"})
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("raw_path") or b"")
        if size + len(scope.get("query_string") or b"") > self._settings.max_header_bytes:
            return status_response(
                431, f"The headers are larger than {self._settings.max_header_bytes} bytes; send fewer of them."
            )
        if self._gate.is_open and not is_loopback(_host(scope)):  # a web page could make a name point here
            return status_response(
                403, "Without keys this service is asked as localhost or by a loopback address only; make a key first."
            )
        met = [row for row in self._table if row[0].match(scope["path"])]
        if not met:
            return status_response(404, "There is no such path; see /openapi.json for those that there are.")
        found = next((row for row in met if scope["method"] in row[1]), None)
        if found is None:
            allowed = ", ".join(sorted(set().union(*(methods for _, methods, _, _ in met))))
            return status_response(405, f"This path answers to {allowed} only.", {"Allow": allowed})
        _, _, kind, (most, objects) = found
        scope["state"]["limits"] = most, objects
        if kind != "public":
            try:
                principal = let_in(self._gate, scope, kind)
                if kind == "ask":
                    self._count(principal)
            except ServiceError as error:
                return error_response(error)
        if length is not None and (not length.isdigit() or int(length) > most):
            return status_response(413, _too_large(most))
        has_body = chunked or length not in (None, "0")
        if has_body and objects is not None and not _is_json(scope):
            return status_response(415, "The body is read as JSON only; send it with Content-Type: application/json.")
        return None

    def _count(self, principal: Principal) -> None:
        try:
            self._gate.count(principal)
        except TooManyRequests:
            if self._metrics is not None:
                self._metrics.rejected("quota")
            raise


class _Body:
    """A request's body as it comes, up to limits: a body sent in chunks does not say its length beforehand."""

    def __init__(self, receive: Receive, limit: int, objects: int | None) -> None:
        self._receive, self._limit, self._left, self._objects = receive, limit, limit, objects

    async def __call__(self) -> Message:
        message = await self._receive()
        body = message.get("body", b"")
        self._left -= len(body)
        if self._left < 0:
            raise HTTPException(413, _too_large(self._limit))  # the framework lets only these through
        if self._objects is None:  # a file, which is written as it comes
            return message
        self._objects -= body.count(b"[") + body.count(b"{")
        if self._objects < 0:
            raise HTTPException(413, "The body has too many lists and objects, or brackets in texts; send fewer.")
        return message


class _Visit:
    """One request: its id goes into the answer's headers, and one line about it into the log."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.id = request_id
        self.status = 0
        self._scope, self._send, self._began = scope, send, time.perf_counter()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)

    def log(self) -> None:
        principal = self._scope["state"].get("principal")
        unremarkable = self._scope["path"] in _PROBES and self.status == 200  # an orchestrator asks every few seconds
        _log.log(
            logging.DEBUG if unremarkable else logging.INFO,
            "request %s: %s %s -> %d in %.3f s, key %s",
            self.id,
            self._scope["method"],
            _printable(self._scope["path"]),
            self.status,
            time.perf_counter() - self._began,
            None if principal is None else principal.key_id,
        )


async def _wait_for_end(receive: Receive) -> None:
    """Wait until the server knows that a connection which it closes is gone; till then it complains of no answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSING_SECONDS):
            while (await receive())["type"] != "http.disconnect":
                pass


def _too_large(limit: int) -> str:
    return f"The body is larger than {limit} bytes; send less at a time."


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _header(scope: Scope, name: bytes) -> str | None:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if values else None


def _is_json(scope: Scope) -> bool:
    return _JSON.fullmatch(_header(scope, b"content-type") or "") is not None


def _host(scope: Scope) -> str:
    """The name or address that a caller thinks the service has, without its port."""
    return re.sub(r":\d*$", "", (_header(scope, b"host") or "").lower()).removeprefix("[").removesuffix("]")


def _printable(path: str) -> str:
    """A path for the log: on one line, and no longer than it has to be."""
    return path[:200].encode("unicode_escape").decode()
