"""Jobs that run one after another on a thread of their own, so that whoever makes bytes does not wait for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

QUEUE_BYTES = 64 << 20
"""Bytes that may wait; a job that is larger than this waits alone."""


class WriteBehind:
    """Runs jobs in the order in which they come; after the first failure none runs, and whoever comes next is told."""

    def __init__(self, limit: int = QUEUE_BYTES) -> None:
        self._limit = limit
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting = 0
        self._closed = False
        self._error: Exception | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], nbytes: int = 0) -> None:
        """Hand over a job that holds `nbytes`; waits while too many bytes are held.

        Raises:
            Exception: what the first job that failed raised.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._waiting or self._waiting + nbytes <= self._limit
            )
            if self._error is not None:
                raise self._error
            self._jobs.append((job, nbytes))
            self._waiting += nbytes
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all jobs are done, and end the thread.

        Raises:
            Exception: what the first job that failed raised.
        """
        self._end()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Drop the jobs that have not begun, and end the thread; nothing is raised."""
        with self._changed:
            self._jobs.clear()
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, nbytes = self._jobs.popleft()
            try:
                job()
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._closed = True
                    self._changed.notify_all()
                return
            del job  # and with it the tensor that it wrote
            with self._changed:
                self._waiting -= nbytes
                self._changed.notify_all()
