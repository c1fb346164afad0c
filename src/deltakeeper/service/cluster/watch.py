"""The thread of the ingress that speaks with replicas, and what it last heard of each of them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from deltakeeper.errors import EngineError
from deltakeeper.service.cluster.calls import Replicas
from deltakeeper.service.cluster.messages import Report, Told
from deltakeeper.service.repeats import Repeats

_log = logging.getLogger("deltakeeper.service")
_T = TypeVar("_T")
_EVERY_SECONDS = 0.5
_STALE_SECONDS = 30.0
"""How long what was heard of a replica counts while nothing new is."""
_GONE_KEPT = 1024


class Watch:
    """Runs a loop on a thread of its own, and asks all replicas for reports on it.

    Args:
        replicas: which are asked.
        listen: told of the decisions in each report; what it fails with is logged, and ends nothing.
    """

    def __init__(self, replicas: Replicas, listen: Callable[[Told], None] = lambda told: None) -> None:
        self.replicas = replicas
        self.loop = asyncio.new_event_loop()
        self._listen, self._repeats = listen, Repeats()
        self._lock = threading.Lock()
        self._live: dict[str, Report] = {}
        self._gone: dict[str, Report] = {}
        self._heard = 0.0
        self._thread = threading.Thread(target=self._run, name="deltakeeper-cluster", daemon=True)
        self._thread.start()
        self._asking = asyncio.run_coroutine_threadsafe(self._ask(), self.loop)

    def live(self) -> list[Report]:
        """The latest report of each replica that runs, by id."""
        with self._lock:
            stale = time.monotonic() - self._heard > _STALE_SECONDS
            return [] if stale else [self._live[name] for name in sorted(self._live)]

    def gone(self) -> list[Report]:
        """The last reports of replicas that ran before."""
        with self._lock:
            return list(self._gone.values())

    def wait(self, seconds: float) -> Report:
        """The first report of a replica.

        Raises:
            EngineError: none came in time.
        """
        end = time.monotonic() + seconds
        while not (live := self.live()):
            if time.monotonic() > end:
                raise EngineError(f"no replica has reported within {seconds:g} seconds; look at the nodes' logs.")
            time.sleep(0.05)
        return live[0]

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Do something on the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """End the thread, and whatever runs on it."""
        if self.loop.is_closed():
            return
        self.run(self._cancel_all()).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()

    def take(self, reports: list[Report]) -> None:
        """What all replicas that run have said; those that are not among them are gone."""
        for report in reports:
            try:
                self._listen(report.told)
            except Exception as error:  # the next report tells them again
                why, told = f"{type(error).__name__}: {error}", "decisions of replica %s were not taken in: %s"
                self._repeats.log(_log, logging.ERROR, report.replica, why, told, report.replica, why)
        with self._lock:
            now = {report.replica: report for report in reports}
            for name, report in self._live.items():
                if name not in now:
                    self._gone[name] = replace(report, store=replace(report.store, tenants={}))
            for name in now:
                self._gone.pop(name, None)  # it was only silent
            while len(self._gone) > _GONE_KEPT:
                del self._gone[next(iter(self._gone))]
            self._live, self._heard = now, time.monotonic()

    async def refresh(self) -> None:
        """Ask all replicas for reports now; on the loop."""
        try:
            reports = await self.replicas.reports()
            if reports is not None:
                self.take(reports)
        except Exception:
            _log.exception("the replicas could not be asked for reports")

    async def _ask(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_EVERY_SECONDS)

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
