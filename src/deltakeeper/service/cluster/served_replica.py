"""A replica as Ray Serve runs it: an actor on a node of the cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import ray
from ray import serve

from deltakeeper.errors import EngineError
from deltakeeper.service.cluster.messages import (
    Asked,
    Failure,
    Loaded,
    Looked,
    Piece,
    Place,
    ReplicaPlan,
    Report,
)
from deltakeeper.service.cluster.replica import Replica
from deltakeeper.service.cluster.scaling import Scaling


class ServedReplica:
    """Gives Ray Serve the names of the tenants that came here, and passes on all else."""

    def __init__(self, made: tuple[ReplicaPlan, Scaling]) -> None:
        self._made, plan = made, made[0]
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(plan, name, ray.get_runtime_context().get_node_id())

    # the store counts bytes, which is what there is a limit of
    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _note(self, tenant: str) -> str:
        return tenant

    async def answer(self, asked: Asked) -> AsyncIterator[Piece]:
        """See `Replica.answer`."""
        if asked.place is not None:
            await self._note(asked.place.name)
        async for piece in self._replica.answer(asked):
            yield piece

    async def load(self, place: Place) -> Loaded | Failure:
        """See `Replica.load`."""
        await self._note(place.name)
        return await self._replica.load(place)

    async def decide(self, name: str, folder: Path) -> Looked | Failure:
        """See `Replica.decide`."""
        return await self._replica.decide(name, folder)

    async def unload(self, name: str) -> None:
        """See `Replica.unload`."""
        self._replica.unload(name)

    async def remove(self, name: str) -> None:
        """See `Replica.remove`."""
        self._replica.remove(name)

    async def made(self) -> tuple[ReplicaPlan, Scaling]:
        """What it and the others were made by, for an ingress that finds them."""
        return self._made

    async def report(self) -> Report:
        """See `Replica.report`."""
        return self._replica.report()

    def check_health(self) -> None:
        """Have Ray Serve start another in its place once the engine has stopped."""
        if not self._replica.alive:
            raise EngineError("the engine of this replica has stopped.")

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.close()
