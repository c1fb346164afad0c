"""What a running service notes of names, beside what the store knows of them; nothing of it outlives the process."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltakeeper.service.repeats import Repeats


@dataclass
class TenantNotes:
    """Notes by name; each is read and written in one step.

    Attributes:
        told: why a model could not be served, as the log says already.
        repeats: what the log says of models again and again.
        put_away: names that were unloaded for good: their folders are not taken up again because somebody asks.
    """

    told: dict[str, str] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)
    put_away: set[str] = field(default_factory=set)
