"""Which replica a request goes to. Ray Serve loads this class into the ingress by its name."""

from __future__ import annotations

import random

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from deltakeeper.service.cluster.preference import ranked

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
        rest = {replica.replica_id.unique_id: replica for rank in others for replica in rank}
        return [rank for rank in (holding, *([rest[name]] for name in ranked(tenant, rest))) if rank]
