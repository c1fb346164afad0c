"""Which replica a request goes to. Ray Serve loads this class into the ingress by its name."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

ROUTER = "deltakeeper.service.cluster.routing:ResidencyRouter"


class ResidencyRouter(MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """A tenant goes where it is, and where it is nowhere, to a replica that its name chooses.

    Ray Serve's own multiplexing knows where a tenant is some tenths of a second after the first request, and sends what
    comes before that anywhere. Here the name decides meanwhile (rendezvous hashing): all requests of a burst meet, and
    where a replica is lost, only its tenants move. One that is full is passed over for the next by the same order. The
    base goes to the less busy of two.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, best first; the first that takes the request gets it."""
        tenant = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        if not tenant:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        holding, *others = self.rank_replicas_via_multiplex(candidate_replicas, tenant)
        rest = ranked(tenant, [replica for rank in others for replica in rank])
        return [rank for rank in (holding, *([replica] for replica in rest)) if rank]


def ranked(tenant: str, replicas: list[Any]) -> list[Any]:
    """Replicas in the order in which a tenant prefers them; each keeps its place whichever others there are."""
    return sorted(replicas, key=lambda r: hashlib.sha256(f"{tenant}\n{r.replica_id.unique_id}".encode()).digest())
