"""Several wait for one load or one turn of a name: whoever goes away first ends it for nobody else."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest
from admission_parts import write_policy
from cluster_cases import clustered_here, make_plan
from service_cases import wait_until

from deltakeeper.engine import Request
from deltakeeper.errors import ArtifactError, TenantError
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.cluster_tenants import ClusterTenants
from deltakeeper.service.cluster.messages import Asked, Loaded, Place, Told
from deltakeeper.service.cluster.shared_work import share
from deltakeeper.service.cluster.watch import Watch


class SlowReplicas:
    """They load when they are let."""

    def __init__(self):
        self.loads, self.may = 0, asyncio.Event()

    async def load(self, place):
        self.loads += 1
        await self.may.wait()
        return Loaded("v", 8, {}, Told("r0"))

    async def reports(self):
        return []


@pytest.fixture
def watch():
    made = Watch(SlowReplicas())
    yield made
    made.close()


def test_a_request_that_goes_does_not_end_the_load_that_others_wait_for(watch, tmp_path):
    catalog = Catalog(tmp_path)
    catalog.register("x", tmp_path / "x")
    tenants = ClusterTenants(watch, catalog, tries=1, delta_bytes=1)

    async def play():
        async def wait(seconds):
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(tenants.load("x"))

        first, second = asyncio.create_task(wait(0.05)), asyncio.create_task(wait(20))
        with pytest.raises(TimeoutError):
            await first
        await asyncio.sleep(0.05)
        assert not second.done()
        watch.loop.call_soon_threadsafe(watch.replicas.may.set)
        return await second

    assert asyncio.run(play()) == "v" and watch.replicas.loads == 1
    assert tenants.acquire("x").version == "v"


def test_a_replacement_can_be_given_up_as_on_one_machine(watch, tmp_path):
    catalog = Catalog(tmp_path)
    catalog.register("x", tmp_path / "x")
    tenants = ClusterTenants(watch, catalog, tries=1, delta_bytes=1)
    replacement = tenants.replace("x", tmp_path / "y")
    wait_until(lambda: watch.replicas.loads == 1)
    assert replacement.cancel()
    watch.loop.call_soon_threadsafe(watch.replicas.may.set)
    assert tenants.load("x").result(20) == "v" and tenants.source("x").path == tmp_path / "x"


def test_shared_work_ends_as_it_does_and_says_so_where_it_was_given_up():
    works = [Future() for _ in range(3)]
    shared = [share(work) for work in works]
    assert not any(one.cancel() or one.done() for one in shared)
    works[0].set_result("v")
    works[1].set_exception(ArtifactError("a."))
    works[2].cancel()
    assert shared[0].result(0) == "v" and str(shared[1].exception(0)) == "a."
    assert isinstance(shared[2].exception(0), TenantError) and "given up" in str(shared[2].exception(0))


def test_a_client_that_goes_does_not_end_the_turn_of_a_name_that_others_wait_for(cluster_folder, tmp_path, monkeypatch):
    deltas, turning = cluster_folder / "deltas", Future()
    plan = make_plan(cluster_folder, tmp_path, policy=write_policy(tmp_path))
    with clustered_here(plan, cluster_folder, 1) as (_, replicas):
        replica = replicas.alive["r0"]

        async def ask(place):
            request = Request((5, 6, 7), place.name, 2)
            return [piece async for piece in replica.answer(Asked(request, place))][-1].ended.reason

        async def play():
            assert await ask(Place("x", deltas / "signs", None, 1)) == "length"
            monkeypatch.setattr(replica._admission, "replace", lambda *_, **__: turning)
            place = Place("x", deltas / "ranks", None, 2)
            first, second = asyncio.create_task(ask(place)), asyncio.create_task(ask(place))
            await asyncio.sleep(0.2)
            first.cancel()
            await asyncio.wait([first])
            assert first.cancelled() and not second.done() and not turning.cancelled()
            turning.set_result("v")
            assert await asyncio.wait_for(second, 20) == "length"
            assert replica._places["x"] == place

        asyncio.run(play())
