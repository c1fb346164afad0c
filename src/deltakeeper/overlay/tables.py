"""One table of terms for a whole model, so that a tenant comes and goes by the writing of one row of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltakeeper.overlay.site import Site

FIRST_SLOTS = 8


class Tables:
    """Numbers of held terms by lane, slot and depth; 0 is nothing. Sites hold views, and take new ones when it grows.

    Attributes:
        numbers: int64 `(lanes, slots, depth)`.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = list(sites)
        lanes = 0
        for site in self.sites:
            site.first_lane = lanes
            lanes += site.lanes
        self.numbers = torch.zeros(lanes, FIRST_SLOTS, 1, dtype=torch.int64)
        self._hand_out()

    @property
    def slots(self) -> int:
        """Slots that there is room for, the base's included."""
        return self.numbers.shape[1]

    def reserve(self, slot: int, depth: int) -> None:
        """Make room for a slot, and for so many terms at one place; a pass under way keeps what it has."""
        lanes, slots, deep = self.numbers.shape
        if slot < slots and depth <= deep:
            return
        while slots <= slot:
            slots *= 2
        new = torch.zeros(lanes, slots, max(depth, deep), dtype=torch.int64)
        new[:, : self.slots, :deep] = self.numbers
        self.numbers = new
        self._hand_out()

    def write(self, slot: int, numbers: torch.Tensor) -> None:
        """Set one slot, int64 `(lanes, depth)`."""
        self.numbers[:, slot, : numbers.shape[1]] = numbers

    def clear(self, slot: int) -> None:
        """Forget one slot."""
        self.numbers[:, slot] = 0

    def _hand_out(self) -> None:
        for site in self.sites:
            site.grow(self.numbers[site.first_lane : site.first_lane + site.lanes], self.slots)
