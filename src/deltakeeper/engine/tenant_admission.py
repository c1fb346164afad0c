"""Who may load: bytes and places are reserved before a load, and the least recently used idle residents make room."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from deltakeeper.engine.tenant_records import Version

OVERTAKES = 8
"""How many later versions may be let in before one that pinned residents keep out; then all wait behind it."""


class Ledger:
    """Bytes and places of the residents and of the loads in progress; never more than there are.

    Attributes:
        budget: bytes.
        places: residents at a time, infinite where they are not limited.
        reserved: bytes held for loads that have not ended.
        resident: bytes of deltas in memory.
        taken: places in use.
    """

    def __init__(self, budget: int, places: int | None) -> None:
        self.budget = budget
        self.places: float = math.inf if places is None else places
        self.reserved = 0
        self.resident = 0
        self.taken = 0

    @property
    def free(self) -> Room:
        """What is neither reserved nor resident."""
        return Room(self.budget - self.reserved - self.resident, self.places - self.taken)

    def reserve(self, version: Version) -> None:
        """Hold what a version wants, or the rest of it."""
        self.reserved += version.wanted - version.held
        self.taken += not version.placed
        version.held, version.placed = version.wanted, True

    def settle(self, version: Version, nbytes: int) -> None:
        """Turn a reservation into the bytes of a delta, which are no more."""
        self.reserved -= version.held
        self.resident += nbytes
        version.held, version.settled = nbytes, True

    def release(self, version: Version) -> None:
        """Give back what a version holds, if anything."""
        if version.settled:
            self.resident -= version.held
        else:
            self.reserved -= version.held
        self.taken -= version.placed
        version.held, version.settled, version.placed = 0, False, False


@dataclass(frozen=True)
class Room:
    """Bytes and places, of what is free or what is needed."""

    nbytes: int
    places: float

    def __add__(self, other: Room) -> Room:
        return Room(self.nbytes + other.nbytes, self.places + other.places)

    def __sub__(self, other: Room) -> Room:
        return Room(self.nbytes - other.nbytes, self.places - other.places)

    def holds(self, need: Room) -> bool:
        """Whether `need` fits."""
        return self.nbytes >= need.nbytes and self.places >= need.places


def room_of(version: Version) -> Room:
    """What comes free when a version goes."""
    return Room(version.held, int(version.placed))


def need_of(version: Version) -> Room:
    """What a version has yet to be given."""
    return Room(version.wanted - version.held, int(not version.placed))


@dataclass
class Plan:
    """What to do now.

    Attributes:
        granted: waiting versions that fit, in order.
        evicted: idle residents that go, so that a version that still waits fits once they are gone.
        drained: residents in use that get no new request, since their own replacement does not fit beside them.
        dropped: loaded versions that turned out larger than reserved, and would wait for pinned ones to grow.
        look_again: clock time at which a resident stops being fresh, infinite if none keeps anybody out.
    """

    granted: list[Version] = field(default_factory=list)
    evicted: list[Version] = field(default_factory=list)
    drained: list[Version] = field(default_factory=list)
    dropped: list[Version] = field(default_factory=list)
    look_again: float = math.inf


def plan_admission(waiting: Collection[Version], live: Collection[Version], ledger: Ledger, now: float) -> Plan:
    """Decide who of `waiting`, first come first, is let in, and which of the `live` versions make room.

    Nobody is evicted for a version that would not fit all the same: it waits until pinned residents are released, and
    up to `OVERTAKES` later ones pass it meanwhile. What an earlier one waits for is not given to a later one.
    """
    plan = Plan()
    free = soon = ledger.free
    for version in live:
        if version.going:
            soon += room_of(version)
    idle = sorted((v for v in live if v.stage == "published" and not v.pins), key=lambda v: v.last_used)
    passed: list[Version] = []
    shut = False
    for version in waiting:
        if shut and version.delta is None:
            continue
        need = need_of(version)
        if free.holds(need):
            plan.granted.append(version)
            for other in passed:
                other.overtaken += 1
        else:
            own = version.tenant.current
            victims = _victims(need - soon, [v for v in idle if v is not own and v.fresh_until <= now])
            if victims is None and own in idle:  # the version that still serves this tenant goes last
                victims = _victims(need - soon, [*(v for v in idle if v is not own and v.fresh_until <= now), own])
            if victims is None:
                _refuse(version, need - soon, idle, ledger, now, plan)
                shut = shut or version.overtaken >= OVERTAKES
                passed.append(version)
                continue
            for victim in victims:
                idle.remove(victim)
                soon += room_of(victim)
            plan.evicted += victims
        free -= need
        soon -= need
    return plan


def _victims(lacking: Room, idle: list[Version]) -> list[Version] | None:
    """The first of `idle` that together free what is lacking, or None if all of them do not."""
    chosen, freed = [], Room(0, 0)
    for version in idle:
        if freed.holds(lacking):
            break
        chosen.append(version)
        freed += room_of(version)
    return chosen if freed.holds(lacking) else None


def _refuse(version: Version, lacking: Room, idle: list[Version], ledger: Ledger, now: float, plan: Plan) -> None:
    """A version that has to wait for others than idle residents: see what else may help it."""
    fresh = [v.fresh_until for v in idle if v.fresh_until > now]
    plan.look_again = min([plan.look_again, *fresh])
    if version.delta is not None and _victims(lacking, idle) is None:
        plan.dropped.append(version)
    own = version.tenant.current
    if own is not None and own.stage == "published" and own.pins:  # one without pins is on its way out already
        beside = Room(ledger.budget, ledger.places) - room_of(own)
        if not beside.holds(Room(version.wanted, 1)):
            plan.drained.append(own)
