"""Whose requests go to the replicas next: there they wait first come first, so no owner may take all of their room."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from deltakeeper.engine.line_room import fits


class Departures:
    """Lets requests go while replicas take them; on one loop.

    An owner has as many under way as it leaves room for others. Alone that is half of what replicas take, which is as
    much as they compute at once; the rest waits here, and goes whenever its owner has the fewest under way.

    Args:
        capacity: requests that the replicas take that run now.
    """

    def __init__(self, capacity: Callable[[], int]) -> None:
        self._capacity = capacity
        self._away: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def away(self, owner: str) -> AsyncIterator[None]:
        """Wait for a turn; the request is under way until the block ends."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append(turn)
        self._let_go()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():  # whoever asked went away before
                if turn in self._lines.get(owner, ()):
                    self._lines[owner].remove(turn)
                    self._tidy(owner)
            else:
                self._away[owner] -= 1
                self._away += Counter()  # without those that have none
            self._let_go()

    def _let_go(self) -> None:
        while self._lines:
            owner = min(self._lines, key=self._away.__getitem__)
            if not fits(self._capacity(), self._away.total(), self._away[owner], 1):
                return
            turn = self._lines[owner].popleft()
            self._tidy(owner)
            if not turn.cancelled():
                self._away[owner] += 1
                turn.set_result(None)

    def _tidy(self, owner: str) -> None:
        if not self._lines[owner]:
            del self._lines[owner]
