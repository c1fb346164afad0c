"""From a thread that makes tokens to a loop that hands them on."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Bell:
    """Wakes an event of a loop from any thread: at most one call is on its way at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._loop, self._event = loop, event
        self._rung = False

    def ring(self) -> None:
        """Set the event soon; quick, and harmless when the loop is gone."""
        if self._rung:
            return
        self._rung = True
        with suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # first: what comes from now on rings again
        self._event.set()
