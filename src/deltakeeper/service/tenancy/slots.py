"""Requests at a time that several holders share."""

from __future__ import annotations

from collections.abc import Hashable

RETRY_SECONDS = 1.0
CLAIM_SECONDS = 3.0
"""How long a freed slot is kept for whoever was refused first: time enough to come back after `RETRY_SECONDS`."""
GAP_SECONDS = 3.0
"""How long a holder's share is kept after its last request: between two of them others must not take it all."""


class Slots:
    """Counts running requests by holder; one thread at a time.

    Two rules make it fair. No holder gets more than an equal share, rounded up, among those that run, wait, or have
    just ended. And a holder that was refused because all was taken stands in a line: a slot that is free is kept for
    those who stand before the one who asks, so that who asks most often does not win.

    Args:
        limit: requests at a time of all holders together; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.running: dict[Hashable, int] = {}
        self._claims: dict[Hashable, float] = {}  # by age; the time is when it asked last
        self._ended: dict[Hashable, float] = {}

    def wait(self, holder: Hashable, now: float) -> float:
        """Seconds after which to ask again, 0 if a slot is free for the holder now."""
        if self.limit is None:
            return 0.0
        self._claims = {h: at for h, at in self._claims.items() if now - at <= CLAIM_SECONDS}
        self._ended = {h: at for h, at in self._ended.items() if now - at <= GAP_SECONDS}
        competing = {*self.running, *self._claims, *self._ended, holder}
        if self.running.get(holder, 0) >= -(-self.limit // len(competing)):
            self._claims.pop(holder, None)  # it could not use a slot that is kept for it
            return RETRY_SECONDS
        ahead = len(self._claims)
        if holder in self._claims:
            ahead = list(self._claims).index(holder)
        if self.limit - sum(self.running.values()) > ahead:
            return 0.0
        self._claims[holder] = now
        return RETRY_SECONDS

    def take(self, holder: Hashable) -> None:
        """Count a request that begins."""
        self.running[holder] = self.running.get(holder, 0) + 1
        self._claims.pop(holder, None)

    def give(self, holder: Hashable, now: float) -> None:
        """Count a request that has ended."""
        if self.limit is not None:
            self._ended[holder] = now
        left = self.running.get(holder, 0) - 1
        if left > 0:
            self.running[holder] = left
        else:
            self.running.pop(holder, None)
