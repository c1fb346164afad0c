"""Jobs of the tenant store, most urgent first, on a few threads of their own."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from itertools import count
from threading import Condition, Thread

_LOG = logging.getLogger(__name__)

FREE, LOAD, AHEAD = 0, 1, 2
"""How urgent a job is: memory is given back first, files are read ahead when there is nothing else to do."""


class JobQueue:
    """Runs jobs by urgency, then in the order in which they came; no lock is held while one runs.

    Args:
        threads: how many run at a time; with 0 a job runs when somebody calls `run_one`.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = count()
        self._stopped = False
        self._changed = Condition()
        self._threads = [Thread(target=self._run, name=f"tenant-loader-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> int:
        """Number of threads."""
        return len(self._threads)

    def put(self, urgency: int, job: Callable[[], object]) -> None:
        """Add a job; after `stop` it is dropped. What it raises on a thread is logged, and the thread goes on."""
        with self._changed:
            if not self._stopped:
                heapq.heappush(self._jobs, (urgency, next(self._numbers), job))
                self._changed.notify()

    def run_one(self) -> bool:
        """Run the next job on the caller's thread; False if there is none."""
        with self._changed:
            if not self._jobs:
                return False
            job = heapq.heappop(self._jobs)[2]
        job()
        return True

    def stop(self) -> None:
        """Drop the jobs that have not begun, and wait for those that have."""
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                job = heapq.heappop(self._jobs)[2]
            try:
                job()
            except Exception:
                _LOG.exception("a job of the tenant store failed")
            del job  # and with it the version that it worked on
