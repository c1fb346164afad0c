"""Server-sent events as OpenAI's clients read them: `data: {json}`, a blank line, and `data: [DONE]` at the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltakeeper.service.errors import ServiceError
from deltakeeper.service.openai.answering import AnswerFailedError, Answering

_log = logging.getLogger("deltakeeper.service")
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
DOCUMENTED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What a route that may stream says in the OpenAPI document; OpenAPI 3.1 has no words for the events in it."""
KEEP_ALIVE = b": still at work\n\n"


class EventStream(Response):
    """A response that writes objects as they come, and ends the answers when its client goes.

    Args:
        chunks: JSON objects; None asks for a comment that keeps proxies from closing a silent connection.
        answering: what they are made of; it is closed at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any] | None], answering: Answering) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks, self._answering = chunks, answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write everything; what goes wrong after the first byte can only be said in an event of its own."""
        watcher = asyncio.create_task(self._answering.watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events(scope["state"].get("request_id")):
                if self._answering.gone:
                    return
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client is gone, and the server says so here
            pass
        finally:
            watcher.cancel()
            self._answering.close()

    async def _events(self, request_id: str | None) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield KEEP_ALIVE if chunk is None else _event(chunk)
            yield b"data: [DONE]\n\n"
        except ServiceError as error:
            self._answering.broke_off(request_id, error)
            yield _event(error.to_json())
        except Exception:
            _log.exception("request %s broke off", request_id)
            told = "The service failed in a way that it does not know; its log says how, under this request id."
            yield _event(AnswerFailedError(told).to_json())


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
