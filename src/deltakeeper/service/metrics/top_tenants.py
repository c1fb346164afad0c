"""Which tenants have series of their own: the busiest ones, so that many tenants do not make as many series."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

OTHER = "(other)"
"""Label of all tenants without series of their own; parentheses stand in no tenant's name."""
_MARGIN = 2.0
"""How many times busier than the least busy a tenant must be to take its place, so that two do not take turns."""


class TopTenants:
    """The busiest tenants of late; their load fades with a half-life.

    Rates stay right through all changes: what a tenant did before it had a series stays counted under `(other)`, its
    own series begin at nothing, and the series of one that loses its place end.
    """

    def __init__(
        self,
        most: int,
        drop: Callable[[str], None],
        *,
        half_life: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Give places away.

        Args:
            most: how many.
            drop: called with the label of a tenant that loses its place.
            half_life: seconds.
            clock: monotonic seconds.
        """
        self._most, self._drop, self._half_life, self._clock = most, drop, half_life, clock
        self._lock = threading.Lock()
        self._scores: dict[str, tuple[float, float]] = {}  # score, and when it was right
        self._own: set[str] = set()

    def label(self, tenant: str, weight: float) -> str:
        """Under which label a tenant counts from now on, given what it has just asked of the machine."""
        with self._lock:
            now = self._clock()
            self._scores[tenant] = (self._score(tenant, now) + weight, now)
            if tenant not in self._own:
                self._seek_place(tenant, now)
            if len(self._scores) > 16 * self._most:
                kept = sorted(self._scores, key=lambda name: self._score(name, now))[-8 * self._most :]
                self._scores = {name: self._scores[name] for name in {*kept, *self._own}}
            return tenant if tenant in self._own else OTHER

    def labels(self) -> set[str]:
        """Tenants that have a place."""
        with self._lock:
            return set(self._own)

    def _seek_place(self, tenant: str, now: float) -> None:
        if len(self._own) < self._most:
            self._own.add(tenant)
            return
        least = min(self._own, key=lambda name: self._score(name, now))
        if self._score(tenant, now) > _MARGIN * self._score(least, now):
            self._own.remove(least)
            self._drop(least)
            self._own.add(tenant)

    def _score(self, tenant: str, now: float) -> float:
        score, at = self._scores.get(tenant, (0.0, now))
        return score * float(0.5 ** ((now - at) / self._half_life))
