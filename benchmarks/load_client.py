"""A client that costs next to nothing: a socket a request, and a look at the clock for every event of the stream."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_EVENT = b"data: {"
_TAIL = 4096
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
SECONDS = 300


@dataclass
class Answer:
    """One request, as its client saw it; seconds are of `time.perf_counter()`.

    Attributes:
        tenant: who was asked.
        sent: when the request left.
        status: of HTTP; 0 where the connection broke.
        events: when each event with text came.
        ended: when the connection was closed.
        tokens: of the answer, as its usage says.
        cold: whether the tenant was out of memory when it was asked.
    """

    tenant: str
    sent: float
    status: int = 0
    events: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    cold: bool = False

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]


class Target:
    """A service that is asked for completions.

    Args:
        url: `http://127.0.0.1:…`.
        keys: the key of each tenant, or one for all under `*`.
    """

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port, self._keys = host, int(port), keys

    async def stream(self, tenant: str, prompt: Sequence[int], new: int) -> Answer:
        """Read a greedy answer of so many tokens as a stream."""
        body = {"stream": True, "stream_options": {"include_usage": True}}
        return await self._ask(tenant, prompt, new, body)

    async def whole(self, tenant: str, prompt: Sequence[int], new: int) -> Answer:
        """Wait for a greedy answer of so many tokens."""
        return await self._ask(tenant, prompt, new, {})

    async def _ask(self, tenant: str, prompt: Sequence[int], new: int, more: dict[str, Any]) -> Answer:
        asked = {"model": tenant, "prompt": list(prompt), "max_tokens": new, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | more).encode()
        key = self._keys.get(tenant) or self._keys["*"]
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        answer = Answer(tenant, time.perf_counter())
        loop = asyncio.get_running_loop()
        reader = _Reader(answer, loop.create_future(), bool(more))
        transport, _ = await loop.create_connection(lambda: reader, self._host, self._port)
        try:
            transport.write(head.encode() + body)
            async with asyncio.timeout(SECONDS):
                await reader.done
        finally:
            transport.abort()
        return answer


class _Reader(asyncio.Protocol):
    """Counts events as they come; what they hold is only looked at once, in the end."""

    def __init__(self, answer: Answer, done: asyncio.Future[None], streams: bool) -> None:
        self.answer, self.done, self._streams = answer, done, streams
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        """More of the answer: the end of what was there may be the beginning of an event."""
        now = time.perf_counter()
        if not self.answer.status:
            self.answer.status = int(data.split(b" ", 2)[1])
        joined = self._tail[1 - len(_EVENT) :] + data
        self.answer.events += [now] * joined.count(_EVENT)
        self._tail = (self._tail + data)[-_TAIL:]

    def connection_lost(self, error: Exception | None) -> None:
        """The end: the last event has the usage, and no text."""
        answer = self.answer
        answer.ended = time.perf_counter()
        found = _TOKENS.findall(self._tail)
        answer.tokens = int(found[-1]) if found else 0
        if self._streams and answer.status == 200:
            if b"data: [DONE]" not in self._tail or not answer.tokens:
                answer.status = 0
            answer.events = answer.events[:-1]
        if not self.done.done():
            self.done.set_result(None)
