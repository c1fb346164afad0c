"""A log of decisions that cannot be written is told at the ingress as on one machine, and ends nothing for good."""

from __future__ import annotations

import logging

import pytest
from admission_parts import write_policy
from service_cases import wait_until

from deltakeeper.service.admission import DecisionLog, decisions, read_policy
from deltakeeper.service.admission_port import Decision
from deltakeeper.service.cluster import watch as watching
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.cluster_admission import ClusterAdmission, Gathered
from deltakeeper.service.cluster.cluster_tenants import ClusterTenants
from deltakeeper.service.cluster.messages import Failure, Loaded, Looked, Report, Told
from deltakeeper.service.cluster.watch import Watch
from deltakeeper.service.errors import Unavailable

REFUSED = Decision("x", "refused", reasons=("No.",))
TOLD = Told("r0", ((1, Decision("before", "admitted")), (2, REFUSED)))


class Deciding:
    """One replica that has decided, and says so with everything that it is asked."""

    def __init__(self):
        self.asked, self.told, self.loaded = 0, Told("r0"), Loaded("v", 8, {}, TOLD)

    async def reports(self):
        self.asked += 1
        return [Report(self.told, "node0", 1, 64, None, None)]

    async def decide(self, name, folder):
        return Looked(REFUSED, TOLD)

    async def load(self, place):
        return self.loaded


class Ingress:
    """What of the ingress deals with decisions."""

    def __init__(self, folder):
        self.log = DecisionLog(folder / "decisions.jsonl")
        gathered = Gathered(self.log, read_policy(write_policy(folder)))
        self.watch = Watch(Deciding(), gathered.listen)
        catalog = Catalog(folder)
        catalog.register("x", folder / "x")
        self.tenants = ClusterTenants(self.watch, catalog, tries=1, delta_bytes=1, listen=gathered.listen)
        self.admission = ClusterAdmission(gathered, self.watch, self.tenants)


@pytest.fixture
def ingress(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_EVERY_SECONDS", 0.01)
    made = Ingress(tmp_path)
    yield made
    made.watch.close()
    made.log.close()


@pytest.fixture
def full(monkeypatch):
    """A disk that is full until it is told otherwise."""
    with monkeypatch.context() as patch:

        def write(file, data):
            raise OSError(28, "No space left on device")

        patch.setattr(decisions, "_write_all", write)
        yield patch


def test_replicas_are_asked_on_while_the_log_cannot_be_written(ingress, full, caplog):
    replicas = ingress.watch.replicas
    replicas.told = TOLD
    before = replicas.asked
    wait_until(lambda: replicas.asked > before + 5)
    assert [report.replica for report in ingress.watch.live()] == ["r0"] and ingress.log.recent() == []
    said = [record for record in caplog.records if "were not taken in" in record.getMessage()]
    aloud = [record.levelno for record in said if record.levelno > logging.INFO]  # it is repeated at INFO
    assert aloud == [logging.ERROR] and all("No space left" in record.getMessage() for record in said)
    full.undo()
    wait_until(lambda: [entry["name"] for entry in ingress.log.recent()] == ["x", "before"])


def test_what_cannot_be_written_down_is_tried_again_later(ingress, full):
    for ask in (
        lambda: ingress.admission.decide("x", ingress.tenants.source("x").path),
        lambda: ingress.admission.settle("x", 20),
        lambda: ingress.tenants.load("x").result(20),
    ):
        with pytest.raises(Unavailable, match="No space left") as told:
            ask()
        assert told.value.retry_after
    ingress.watch.replicas.loaded = Failure("SideFileError", "Its tokenizer is none.")  # refused by the ingress itself
    with pytest.raises(Unavailable, match="No space left"):
        ingress.admission.settle("x", 20)
    assert ingress.log.recent() == []
    full.undo()
    assert ingress.admission.settle("x", 20).reasons == ("Its tokenizer is none.",)
    assert ingress.admission.decide("x", ingress.tenants.source("x").path) == REFUSED
    assert [entry["name"] for entry in ingress.log.recent()] == ["x", "before", "x"]
