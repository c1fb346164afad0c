"""One replica on one node of Ray: what it answers, and what a cluster that is not there says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", exc_type=ImportError)

from cluster_cases import make_plan
from ray import exceptions
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray_cases import clustered_on_ray, started_nodes
from service_cases import PROMPT, opened_services, served

from deltakeeper.errors import DataError
from deltakeeper.service.cluster.failures import ReplicaLostError
from deltakeeper.service.cluster.messages import Asked, Place
from deltakeeper.service.cluster.ray_replicas import RayReplicas, connected

ASKED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.3, "seed": 4, "n": 2}


def test_a_replica_on_ray_answers_as_an_engine_in_this_process(cluster_folder, tmp_path, monkeypatch):
    with (
        opened_services(cluster_folder, engine={"threads": 1}) as services,
        served(services) as live,
        live.client() as c,
    ):
        expected = [c.post("/v1/completions", json=ASKED | {"model": m}).json()["choices"] for m in ("base", "signs")]
    with (
        started_nodes(1, monkeypatch) as nodes,
        clustered_on_ray(nodes, cluster_folder, make_plan(cluster_folder, tmp_path)) as service,
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        found = [c.post("/v1/completions", json=ASKED | {"model": m}).json()["choices"] for m in ("base", "signs")]
    assert found == expected


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "no Ray cluster at '127.0.0.1:1'"), ("ray://127.0.0.1:1", "with auto")]
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(address, said):
    with pytest.raises(DataError, match=said), connected(address):
        pass


def task_error():
    """What Ray raises for an error of the replica's own code."""
    return exceptions.RayTaskError("answer", "", ValueError("a bug")).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (exceptions.ActorDiedError(), True),
        (exceptions.ActorUnavailableError("away", None), True),
        (exceptions.NodeDiedError("gone"), True),
        (exceptions.LocalRayletDiedError(), True),
        (exceptions.OutOfMemoryError("full"), True),
        (exceptions.ObjectLostError("0" * 56, None, ""), True),
        (exceptions.OwnerDiedError("0" * 56, None, ""), True),
        (exceptions.RaySystemError("broken"), True),
        (DeploymentUnavailableError(None), True),
        (ReplicaUnavailableError("gone"), True),
        (task_error(), False),
        (exceptions.TaskCancelledError(), False),
    ],
    ids=lambda value: None if isinstance(value, bool) else type(value).__name__,
)
def test_what_ray_says_in_place_of_a_replica_is_a_loss_and_what_its_code_says_is_not(error, lost):
    class Failing:
        """A handle whose calls, streamed or not, end with the error."""

        def options(self, **_):
            call = SimpleNamespace(remote=lambda *_: self)
            return SimpleNamespace(answer=call, load=call)

        def cancel(self):
            pass

        def __await__(self):
            raise error
            yield

        async def __aiter__(self):
            raise error
            yield

    async def ask(replicas):
        async for _ in replicas.answer(Asked(None, None)):
            pass

    replicas = RayReplicas(Failing())
    for work in (ask(replicas), replicas.load(Place("signs", Path("signs"), None, 1))):
        with pytest.raises(ReplicaLostError if lost else type(error)):
            asyncio.run(work)
