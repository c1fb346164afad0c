"""What would be told with every request: it is told aloud once in a while, and counted in between."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

_SECONDS = 60.0
_MOST = 1024
"""Reasons that are remembered; the oldest are forgotten, and would be told again."""


class Repeats:
    """Logs by model and reason; safe on any thread.

    Args:
        seconds: between two times that the same is told at its own level.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float = _SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._lock = seconds, clock, threading.Lock()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}  # when, and how often since

    def log(self, log: logging.Logger, level: int, model: str, why: str, text: str, *arguments: object) -> None:
        """Log at a level, or at INFO beside the line of the request where the same was told a moment ago.

        Args:
            log: where to.
            level: `logging.WARNING` or above.
            model: whom it is about.
            why: the reason, without what differs from request to request.
            text: of the line, with places for the arguments.
            *arguments: for those.
        """
        with self._lock:
            now = self._clock()
            at, since = self._told.pop((model, why), (-math.inf, 0))
            again = now - at < self._seconds
            self._told[model, why] = (at, since + 1) if again else (now, 0)
            if len(self._told) > _MOST:
                del self._told[next(iter(self._told))]
        if again:
            level = logging.INFO
        elif since:
            text += f" (and {since} times since this was last told)"
        log.log(level, text, *arguments)
