"""The waiting line: first come first within a tenant, and the tenant that has had least of the machine first."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from deltakeeper.engine.sequence import Sequence

ANSWER_WEIGHT = 2.0
"""What a token of an answer counts for beside a token of a prompt: it needs a pass of its own."""
_MOST_COUNTERS = 4096


class WaitingLine:
    """Requests that wait, fair between tenants.

    Fairness is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each
    tenant is charged for the tokens computed for it, the lowest counter goes first, and a tenant that returns is lifted
    to the lowest counter of those that are active, so that idling saves nothing up.

    Attributes:
        tokens: tokens that wait.
    """

    def __init__(self) -> None:
        self._lines: dict[str | None, deque[Sequence]] = {}
        self._counters: dict[str | None, float] = {}
        self._running: dict[str | None, int] = {}
        self.tokens = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence, *, first: bool = False) -> None:
        """Add a request at the end of its tenant's line, or in front of it (one that was running before)."""
        tenant = sequence.request.tenant
        if tenant not in self._lines:
            if tenant not in self._running:
                self._lift(tenant)
            self._lines[tenant] = deque()
        line = self._lines[tenant]
        line.appendleft(sequence) if first else line.append(sequence)
        self.tokens += len(sequence.tokens)
        self._length += 1

    def next(self, passed_over: Container[str | None]) -> Sequence | None:
        """Whose turn it is, leaving out some tenants; it stays in the line until `remove`."""
        turns = [tenant for tenant in self._lines if tenant not in passed_over]
        if not turns:
            return None
        return self._lines[min(turns, key=lambda tenant: self._counters.get(tenant, 0.0))][0]

    def remove(self, sequence: Sequence) -> None:
        """Take a request out of its line."""
        tenant = sequence.request.tenant
        line = self._lines[tenant]
        line.remove(sequence)
        if not line:
            del self._lines[tenant]
        self.tokens -= len(sequence.tokens)
        self._length -= 1

    def started(self, tenant: str | None) -> None:
        """Note that a request of a tenant runs."""
        self._running[tenant] = self._running.get(tenant, 0) + 1

    def stopped(self, tenant: str | None) -> None:
        """Note that a request of a tenant runs no more."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def charge(self, tenant: str | None, cost: float) -> None:
        """Count work done for a tenant."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost

    def _lift(self, tenant: str | None) -> None:
        active = [self._counters.get(name, 0.0) for name in {*self._lines, *self._running}]
        lowest = min(active, default=0.0)
        if not active:
            self._counters.clear()  # nobody to be fair to
        elif len(self._counters) > _MOST_COUNTERS:
            kept = {*self._lines, *self._running}
            self._counters = {n: c for n, c in self._counters.items() if n in kept or c > lowest}
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), lowest)
