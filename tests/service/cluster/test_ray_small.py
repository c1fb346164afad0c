"""One replica on one node of Ray: what it answers, and what a cluster that is not there says."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", exc_type=ImportError)

from cluster_cases import make_plan
from ray_cases import clustered_on_ray, started_nodes
from service_cases import PROMPT, opened_services, served

from deltakeeper.errors import DataError
from deltakeeper.service.cluster.ray_replicas import connected

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
