"""One thing at a time, and by turns among those who want it: nobody waits for all that another has handed in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable

from deltakeeper.service.errors import Unavailable

_RETRY_SECONDS = 1.0


class Turns:
    """A lock whose holders go round: of each that waits the oldest request, then of the next one.

    It belongs to one event loop.

    Args:
        most: requests of one holder that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = False
        self._lines: dict[Hashable, deque[asyncio.Future[None]]] = {}  # in the order in which they are next

    async def take(self, holder: Hashable) -> None:
        """Wait for a turn, which `give` ends.

        Raises:
            Unavailable: as many requests of this holder wait as may.
        """
        if not self._taken:
            self._taken = True
            return
        line = self._lines.setdefault(holder, deque())
        if len(line) >= self._most:
            raise Unavailable(
                f"{self._most} requests of this key wait for their prompts to be read by this model, which is as many "
                "as may; ask again when some of them are answered.",
                code="queue_full",
                retry_after=_RETRY_SECONDS,
            )
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at this moment
                self.give()
            elif turn in line:  # `give` has not passed over it
                line.remove(turn)
                if not line:
                    del self._lines[holder]
            raise

    def give(self) -> None:
        """End a turn; the next one begins."""
        while self._lines:
            holder = next(iter(self._lines))
            line = self._lines.pop(holder)
            while line and line[0].done():  # whoever waited has gone, and does not know it before the loop's next round
                line.popleft()
            if line:
                turn = line.popleft()
                if line:
                    self._lines[holder] = line  # behind the others
                turn.set_result(None)
                return
        self._taken = False
