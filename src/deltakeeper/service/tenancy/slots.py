"""Answers at a time that several holders share."""

from __future__ import annotations

from collections.abc import Hashable

RETRY_SECONDS = 1.0
CLAIM_SECONDS = 3.0
"""How long a freed slot is kept for whoever was refused first: time enough to come back after `RETRY_SECONDS`."""
GAP_SECONDS = 3.0
"""How long a holder's share is kept after its last request: between two of them others must not take it all."""


class Slots:
    """Counts running answers by holder; one thread at a time.

    Two rules make it fair. No holder gets more than an equal share, rounded up, among those that run, wait, or have
    just ended, unless it has nothing else and asks for several in one request, which get their slots all or none. And a
    holder that was refused because all was taken stands in a line: slots that are free are kept for those who stand
    before the one who asks, so that who asks most often does not win.

    Args:
        limit: answers at a time of all holders together; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.running: dict[Hashable, int] = {}
        self._claims: dict[Hashable, tuple[float, int]] = {}  # by age: when it asked last, and for how many
        self._ended: dict[Hashable, float] = {}

    def wait(self, holder: Hashable, now: float, count: int = 1) -> float:
        """Seconds after which to ask again, 0 if so many slots, at most `limit`, are free for the holder now."""
        if self.limit is None:
            return 0.0
        self._claims = {h: claim for h, claim in self._claims.items() if now - claim[0] <= CLAIM_SECONDS}
        self._ended = {h: at for h, at in self._ended.items() if now - at <= GAP_SECONDS}
        competing = {*self.running, *self._claims, *self._ended, holder}
        own = self.running.get(holder, 0)
        if own and own + count > -(-self.limit // len(competing)):
            self._claims.pop(holder, None)  # it could not use a slot that is kept for it
            return RETRY_SECONDS
        ahead = 0
        for other, (_, wanted) in self._claims.items():
            if other == holder:
                break
            ahead += wanted
        if self.limit - sum(self.running.values()) >= ahead + count:
            return 0.0
        self._claims[holder] = now, count
        return RETRY_SECONDS

    def leave(self, holder: Hashable) -> None:
        """Keep no slots for a holder that does not ask for them any more."""
        self._claims.pop(holder, None)

    def take(self, holder: Hashable, count: int = 1) -> None:
        """Count answers that begin."""
        self.running[holder] = self.running.get(holder, 0) + count
        self._claims.pop(holder, None)

    def give(self, holder: Hashable, now: float, count: int = 1) -> None:
        """Count answers that have ended."""
        if self.limit is not None:
            self._ended[holder] = now
        left = self.running.get(holder, 0) - count
        if left > 0:
            self.running[holder] = left
        else:
            self.running.pop(holder, None)
