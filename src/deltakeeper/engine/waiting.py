"""The waiting line: whose turn it is, and from whom a place is taken back for those who wait too long."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from deltakeeper.engine.line_room import LineRoom
from deltakeeper.engine.parties import Circle, Party
from deltakeeper.engine.sequence import Sequence

ANSWER_WEIGHT = 2.0
"""What a token of an answer counts for beside a token of a prompt: it needs a pass of its own."""


class Tenant(Party):
    """A tenant of one owner, whose requests come first come first.

    Attributes:
        line: those that wait.
    """

    __slots__ = ("line",)

    def __init__(self) -> None:
        super().__init__()
        self.line: deque[Sequence] = deque()


class Owner(Party):
    """Whoever asks.

    Attributes:
        tenants: those that it asks.
    """

    __slots__ = ("tenants",)

    def __init__(self) -> None:
        super().__init__()
        self.tenants: Circle[Tenant] = Circle(Tenant)


class WaitingLine:
    """Requests that wait, and how many of whom run: fair between owners, and between the tenants of each.

    Args:
        room: counts who waits. Who pushes a request has let it in there.

    Attributes:
        passes: how many there were, counted by the scheduler.
    """

    def __init__(self, room: LineRoom) -> None:
        self.room = room
        self.passes = 0
        self._owners: Circle[Owner] = Circle(Owner)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        """Add a request at the end of its tenant's line."""
        owner = self._owners.join(sequence.request.owner)
        tenant = owner.tenants.join(sequence.request.tenant)
        tenant.line.append(sequence)
        self._wait(sequence, 1)

    def put_back(self, sequence: Sequence) -> None:
        """Put a request that ran in front of its tenant's line."""
        _, tenant = self._parties(sequence)
        tenant.line.appendleft(sequence)
        self._wait(sequence, 1)
        self._run(sequence, -1)
        self.room.put_back(sequence.request.owner, len(sequence.tokens))

    def start(self, sequence: Sequence) -> None:
        """Take a request out of its line, for it runs now."""
        self._run(sequence, 1)
        self.remove(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Note that a request runs no more."""
        self._run(sequence, -1)
        self._part(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out of its line."""
        _, tenant = self._parties(sequence)
        tenant.line.remove(sequence)
        self._wait(sequence, -1)
        self.room.leave(sequence.request.owner, len(sequence.tokens))
        self._part(sequence)

    def charge(self, sequence: Sequence, cost: float) -> None:
        """Count work that was done for a request that runs."""
        owner, tenant = self._parties(sequence)
        self._owners.charge(owner, cost)
        owner.tenants.charge(tenant, cost)

    def next(self, passed_over: Collection[str | None]) -> Sequence | None:
        """Whose turn it is, leaving out some tenants: it stays in the line until it starts."""
        turns = self._turns()
        if passed_over:
            turns = [pair for pair in turns if pair[1].line[0].request.tenant not in passed_over]
        return min(turns, key=_turn)[1].line[0] if turns else None

    def claims(self) -> Iterator[tuple[Sequence, Tenant]]:
        """Waiting requests to which a place is due that another tenant has, and which; in order of turns."""
        turns = sorted(self._turns(), key=_turn)
        largest = self._owners.largest()
        own = {owner: owner.tenants.largest() for owner, _ in turns}
        for owner, tenant in turns:
            if not tenant.line:  # whoever was asked about has ended
                continue
            sequence = tenant.line[0]
            waited = self.passes - sequence.since
            if largest.makes_room_for(owner, waited):
                yield sequence, largest.tenants.largest()
            elif own[owner].makes_room_for(tenant, waited):
                yield sequence, own[owner]

    def is_of(self, sequence: Sequence, tenant: Tenant) -> bool:
        """Whether a request is one of a tenant of its owner."""
        return self._parties(sequence)[1] is tenant

    def places(self, sequence: Sequence) -> tuple[int, int]:
        """Places that the owner and the tenant of a request have."""
        owner, tenant = self._parties(sequence)
        return owner.running, tenant.running

    def served(self, sequence: Sequence) -> tuple[float, float]:
        """What the owner and the tenant of a request have had."""
        owner, tenant = self._parties(sequence)
        return owner.served, tenant.served

    def _turns(self) -> list[tuple[Owner, Tenant]]:
        """Tenants that have requests here."""
        self._owners.settle()
        turns = []
        for owner in self._owners.there.values():
            if owner.waiting:
                owner.tenants.settle()
                turns += [(owner, tenant) for tenant in owner.tenants.there.values() if tenant.line]
        return turns

    def _parties(self, sequence: Sequence) -> tuple[Owner, Tenant]:
        owner = self._owners.there[sequence.request.owner]
        return owner, owner.tenants.there[sequence.request.tenant]

    def _wait(self, sequence: Sequence, count: int) -> None:
        for party in self._parties(sequence):
            party.waiting += count
        self._length += count
        sequence.since = self.passes

    def _run(self, sequence: Sequence, count: int) -> None:
        for party in self._parties(sequence):
            party.running += count

    def _part(self, sequence: Sequence) -> None:
        owner, _ = self._parties(sequence)
        owner.tenants.part(sequence.request.tenant)
        self._owners.part(sequence.request.owner)


def _turn(pair: tuple[Party, Party]) -> tuple[tuple[int, float], tuple[int, float]]:
    owner, tenant = pair
    return owner.standing, tenant.standing
