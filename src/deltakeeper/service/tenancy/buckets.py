"""An allowance per minute that several holders share: fair while they compete, and whole for one that is alone.

It is a token bucket for each holder, filled from one tap: what comes in is divided equally among the holders that asked
within the last minute, and what a full bucket cannot take goes to the others. So whoever asks for less than an equal
share is always served, however much another one asks, and nothing that somebody wants is left unused. With one holder
it is the plain token bucket.
"""

from __future__ import annotations

from collections.abc import Hashable

MINUTE = 60.0
_SLACK = 1e-6  # of a token: lost to rounding when a holder comes back exactly when it was told to


class SharedBucket:
    """A shared allowance; times are monotonic seconds, and the caller sees to it that one thread uses it at a time.

    Together the holders are never given more than `per_minute` at once and `per_minute / 60` a second, plus what is
    charged after the fact (`take` is not refused), which is owed and paid back before anything else is given.

    Args:
        per_minute: the allowance, and the most that is saved up.
        now: time of its making; it is full then.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = float(per_minute)
        self._levels: dict[Hashable, float] = {}
        self._asked: dict[Hashable, float] = {}
        self._spare = self._per_minute  # in nobody's bucket; only while there is no holder
        self._filled = now

    @property
    def per_minute(self) -> float:
        """The allowance."""
        return self._per_minute

    def wait(self, holder: Hashable, cost: float, now: float) -> float:
        """Seconds until a cost would be given to a holder if the same holders go on sharing, 0 if it is now.

        A cost above the holder's share of what can be saved up is given when that share is full, and owed.
        """
        self._turn(now)
        self._join(holder, now)
        missing = min(cost, self._share) - self._levels[holder]
        return 0.0 if missing <= _SLACK else missing * len(self._levels) * MINUTE / self._per_minute

    def take(self, holder: Hashable, cost: float, now: float) -> None:
        """Charge a holder, also for more than it has."""
        if holder not in self._levels:
            self._turn(now)
        self._join(holder, now)
        self._levels[holder] -= cost

    def resize(self, per_minute: float, now: float) -> None:
        """Change the allowance; what was saved up or is owed stays, as far as there is room."""
        self._turn(now)
        self._per_minute = float(per_minute)
        self._spare = min(self._spare, self._per_minute)
        self._level_off()

    def is_full(self, now: float) -> bool:
        """Whether nothing is in use or owed, so that a new bucket would be the same."""
        self._turn(now)
        return self._spare + sum(self._levels.values()) >= self._per_minute - _SLACK

    @property
    def _share(self) -> float:
        return self._per_minute / max(1, len(self._levels))

    def _turn(self, now: float) -> None:
        """Pour in what has come since the last time, and let go of holders that have long asked for nothing."""
        self._pour(max(0.0, now - self._filled) * self._per_minute / MINUTE)
        self._filled = max(self._filled, now)
        gone = [h for h, at in self._asked.items() if now - at > MINUTE and self._levels[h] >= 0]
        for holder in gone:  # one that owes stays until it has paid
            del self._asked[holder]
            self._spare += self._levels.pop(holder)
        if gone:
            self._pour(0.0)

    def _join(self, holder: Hashable, now: float) -> None:
        self._asked[holder] = now
        if holder not in self._levels:
            self._levels[holder] = 0.0
            self._level_off(holder)

    def _level_off(self, first: Hashable | None = None) -> None:
        """Take away what is above the share, which has become smaller, and give it to one holder first, then to all."""
        for holder, level in self._levels.items():
            surplus = max(0.0, level - self._share)
            self._levels[holder] -= surplus
            self._spare += surplus
        if first is not None:
            given = min(self._share, self._spare)
            self._levels[first] += given
            self._spare -= given
        self._pour(0.0)

    def _pour(self, amount: float) -> None:
        amount += self._spare
        if not self._levels:
            self._spare = min(self._per_minute, amount)
            return
        share, left = self._share, len(self._levels)
        if amount:
            for holder in sorted(self._levels, key=self._levels.__getitem__, reverse=True):  # least room first
                given = min(max(0.0, share - self._levels[holder]), amount / left)
                self._levels[holder] += given
                amount -= given
                left -= 1
        self._spare = 0.0  # all are full, or nothing is left
