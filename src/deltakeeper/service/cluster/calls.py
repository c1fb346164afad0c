"""What the ingress asks of its replicas: a protocol that Ray Serve stands behind, or a fake in tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from deltakeeper.service.cluster.messages import Asked, Failure, Loaded, Looked, Piece, Place, Report


class Replicas(Protocol):
    """All replicas of a service; its methods run on the loop of the ingress's cluster thread.

    What is asked for a tenant goes to the replica that holds it.
    """

    def answer(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """Pieces of an answer; closing the generator ends it. Raises `ReplicaLostError`."""

    async def load(self, place: Place) -> Loaded | Failure:
        """Have a tenant loaded. Raises `ReplicaLostError`."""

    async def decide(self, name: str, folder: Path) -> Looked | Failure:
        """Have policy look at files. Raises `ReplicaLostError`."""

    async def unload(self, name: str) -> None:
        """Free a tenant's memory on all of them."""

    async def remove(self, name: str) -> None:
        """Have all of them forget a tenant."""

    async def reports(self) -> list[Report] | None:
        """Where all of them stand; None where that could not be found out now."""
