"""Parties that share a machine equally: what each has had of it, and when one has to make room for another."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

SLICE = 512.0
"""How much more a party has had, in tokens of a prompt, when it makes room for one that has no place at all."""
PATIENCE = 8
"""Passes that a request waits for a place to come free before one is taken back for it."""
_CREDIT = 4 * SLICE
"""How far a party may stay behind the one that has had most: what it did not ask for earlier is not saved up."""
_MOST_LEFT = 4096


class Party:
    """One that shares with others: an owner of requests, or one of its tenants.

    Attributes:
        served: what was computed for it, in tokens of a prompt.
        running: places that it has in the batch.
        waiting: requests of it that wait for one.
    """

    __slots__ = ("running", "served", "waiting")

    def __init__(self) -> None:
        self.served = 0.0
        self.running = 0
        self.waiting = 0

    @property
    def standing(self) -> tuple[int, float]:
        """What it has now and what it has had: whoever has the least of it comes next."""
        return self.running, self.served

    def makes_room_for(self, other: Party, passes: int) -> bool:
        """Whether a place of it is due to another that has waited for so many passes.

        It is where the other has two places fewer, so that the exchange leaves nobody with less than the other. Where
        there are more parties than places, they take turns.
        """
        if self.running >= other.running + 2:
            return passes >= PATIENCE
        return self.running > other.running == 0 and self.served > other.served + SLICE


P = TypeVar("P", bound=Party)


class Circle(Generic[P]):
    """Parties between which all is equal.

    What each has had is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI
    2024): one that returns is lifted to the lowest counter of those that are there, so that idling saves nothing up.

    Args:
        make: makes a party.

    Attributes:
        there: those that run or wait.
    """

    def __init__(self, make: Callable[[], P]) -> None:
        self.there: dict[Hashable, P] = {}
        self._make = make
        self._left: dict[Hashable, float] = {}
        self._most = 0.0

    def join(self, name: Hashable) -> P:
        """The party of a name, which is there from now on."""
        party = self.there.get(name)
        if party is not None:
            return party
        lowest = min((other.served for other in self.there.values()), default=0.0)
        if not self.there:  # nobody to be fair to
            self._left.clear()
            self._most = 0.0
        elif len(self._left) >= _MOST_LEFT:
            self._left = {n: served for n, served in self._left.items() if served > lowest}
        party = self.there[name] = self._make()
        party.served = max(self._left.pop(name, 0.0), lowest)
        return party

    def part(self, name: Hashable) -> None:
        """Let a party go if nothing of it runs or waits."""
        party = self.there[name]
        if not party.running and not party.waiting:
            self._left[name] = self.there.pop(name).served

    def charge(self, party: P, cost: float) -> None:
        """Count work that was done for a party."""
        party.served += cost
        self._most = max(self._most, party.served)

    def settle(self) -> None:
        """Forget what parties are behind by more than they could make up for soon."""
        for party in self.there.values():
            party.served = max(party.served, self._most - _CREDIT)

    def largest(self) -> P:
        """The party that has the most."""
        return max(self.there.values(), key=_standing)


def _standing(party: Party) -> tuple[int, float]:
    return party.standing
