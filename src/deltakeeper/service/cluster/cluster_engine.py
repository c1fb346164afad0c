"""What answers at the ingress of a cluster: requests go to replicas, and come back as the streams that routes know."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from deltakeeper.engine import EngineStats, Request
from deltakeeper.engine.line_room import LineRoom
from deltakeeper.engine.stream import Stream
from deltakeeper.errors import EngineError
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.departures import Departures
from deltakeeper.service.cluster.feeding import Tally, feed, reproducible
from deltakeeper.service.cluster.messages import Asked, Told
from deltakeeper.service.cluster.scaling import Scaling
from deltakeeper.service.cluster.totals import engine_totals
from deltakeeper.service.cluster.watch import Watch

_PAUSE = 0.01


class ClusterEngine:
    """Implements `serving_port.AnsweringEngine` over replicas.

    Args:
        watch: the thread that speaks with them, and what it heard.
        catalog: what tenants' names stand for.
        scaling: how much a replica takes, and how often a request is asked again.
        context: most tokens of prompt and answer of one request.
        max_waiting: requests that may wait beyond what all replicas take.
        listen: told of decisions that come with answers that failed.
    """

    def __init__(
        self,
        watch: Watch,
        catalog: Catalog,
        scaling: Scaling,
        *,
        context: int,
        max_waiting: int,
        listen: Callable[[Told], None] = lambda told: None,
    ) -> None:
        self.context = context
        self.tally = Tally()
        self._watch, self._catalog, self._scaling = watch, catalog, scaling
        self._max_waiting, self._listen = max_waiting, listen
        self._lock = threading.Lock()
        self._room = LineRoom(max_waiting)
        self._departures = Departures(self._capacity)
        self._open: dict[Stream, Request] = {}
        self._tasks: dict[Stream, asyncio.Task[None]] = {}  # the loop's alone
        self._draining = self._closing = False

    @property
    def alive(self) -> bool:
        """Whether requests are taken; also while no replica runs, since the cluster starts another."""
        return not self._closing

    @property
    def open(self) -> int:
        """Answers under way."""
        return len(self._open)

    def submit(self, request: Request, wake: Callable[[], None] | None = None) -> Stream:
        """Hand in a request; thread-safe, and quick.

        Raises:
            QueueFullError: as many wait as may, beyond what the replicas take that run now, or as many of this owner.
            TenantError: there is no such tenant.
            EngineError: the service is being stopped.
        """
        place = None if request.tenant is None else self._catalog.place(request.tenant)
        asked = Asked(reproducible(request), place)
        most = self._max_waiting + self._capacity()
        stream = Stream(request.id, len(request.prompt), wake, lambda: self._cancel(stream))
        with self._lock:
            if self._draining or self._closing:
                raise EngineError("the engine takes no more requests; it is being closed.")
            self._room.most = most
            self._room.enter(request.owner, len(request.prompt))
            self._open[stream] = request
        self._watch.loop.call_soon_threadsafe(self._begin, stream, asked)
        return stream

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those there are; whether all ended within `timeout` seconds."""
        with self._lock:
            self._draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._open:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(_PAUSE)
        return True

    def close(self) -> None:
        """End open requests as cancelled; harmless twice."""
        with self._lock:
            self._closing = True
            left = list(self._open)
        for stream in left:
            self._cancel(stream)
        end = time.monotonic() + 10
        while self._open and time.monotonic() < end:
            time.sleep(_PAUSE)

    def stats(self) -> EngineStats:
        """All replicas' counters; `recent_steps` is empty, since passes of many engines are no sequence."""
        return engine_totals(self._watch.live(), self._watch.gone())

    def _cancel(self, stream: Stream) -> None:
        with suppress(RuntimeError):  # the loop is closed, and everything has ended
            self._watch.loop.call_soon_threadsafe(self._cancel_now, stream)

    def _cancel_now(self, stream: Stream) -> None:
        if (task := self._tasks.get(stream)) is not None:
            task.cancel()

    def _begin(self, stream: Stream, asked: Asked) -> None:
        task = self._tasks[stream] = self._watch.loop.create_task(self._feed(stream, asked))
        task.add_done_callback(lambda done: self._end(stream))

    def _end(self, stream: Stream) -> None:
        """Whatever became of its task, and even if that never began."""
        del self._tasks[stream]
        stream.end("cancelled")  # unless it has ended
        with self._lock:
            request = self._open.pop(stream)
            self._room.leave(request.owner, len(request.prompt))

    async def _feed(self, stream: Stream, asked: Asked) -> None:
        try:
            async with self._departures.away(asked.request.owner):
                await feed(
                    stream,
                    asked,
                    self._watch.replicas,
                    tries=self._scaling.tries,
                    unchanged=self._unchanged,
                    tally=self.tally,
                    listen=self._listen,
                )
        except Exception as error:
            stream.end("error", error=f"the answer could not be passed on: {error!r}")

    def _capacity(self) -> int:
        """Requests that the replicas take; what is sent while none runs waits for the first."""
        return max(1, len(self._watch.live())) * self._scaling.max_ongoing

    def _unchanged(self, asked: Asked) -> bool:
        return asked.place is None or self._catalog.find(asked.place.name) == asked.place
