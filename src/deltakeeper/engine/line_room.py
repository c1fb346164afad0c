"""Room in a waiting line: bounded for all together, and for each owner by what it leaves to the others."""

from __future__ import annotations

import threading

from deltakeeper.engine.request import QueueFullError


class LineRoom:
    """Counts who waits; safe on any thread.

    An owner may have as much in the line as it leaves free: alone it gets half, and of three that flood each a quarter,
    so that there is always room for one more. This is the dynamic threshold of Choudhury and Hahne, "Dynamic Queue
    Length Thresholds for Shared-Memory Packet Switches" (IEEE/ACM Transactions on Networking, 1998). An owner that has
    nothing in the line only needs what is free.

    Args:
        most: requests that may wait, as below.
        most_tokens: prompt tokens that may wait; None for any number. Where nobody waits, any prompt may.

    Attributes:
        most: requests that may wait; it may be changed.
        requests: how many wait.
    """

    def __init__(self, most: int, most_tokens: int | None = None) -> None:
        self.most, self.requests = most, 0
        self._most_tokens = most_tokens
        self._tokens = 0
        self._owners: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def enter(self, owner: str, tokens: int) -> None:
        """Count a request that comes.

        Raises:
            QueueFullError: there is no room for it.
        """
        with self._lock:
            own, own_tokens = self._owners.get(owner, (0, 0))
            full = not fits(self.most, self.requests, own, 1)
            if self._most_tokens is not None and self.requests:
                full = full or not fits(self._most_tokens, self._tokens, own_tokens, tokens)
            if full:
                whose = f"{self.requests} requests wait already" if not own else f"{own} requests of yours wait already"
                raise QueueFullError(f"{whose}; ask again later.")
            self._add(owner, 1, tokens)

    def put_back(self, owner: str, tokens: int) -> None:
        """Count a request that was taken in before: it waits again, whether there is room or not."""
        with self._lock:
            self._add(owner, 1, tokens)

    def leave(self, owner: str, tokens: int) -> None:
        """Count a request that waits no more."""
        with self._lock:
            self._add(owner, -1, -tokens)

    def _add(self, owner: str, requests: int, tokens: int) -> None:
        own, own_tokens = self._owners.get(owner, (0, 0))
        self.requests += requests
        self._tokens += tokens
        if own + requests:
            self._owners[owner] = own + requests, own_tokens + tokens
        else:
            del self._owners[owner]


def fits(most: int, taken: int, own: int, more: int) -> bool:
    """Whether an owner may have more of a room: it has to leave as much as it takes, or to have nothing yet."""
    left = most - taken
    return more <= left and (not own or own + more <= left)
