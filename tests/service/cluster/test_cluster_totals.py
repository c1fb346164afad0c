"""Sums over replicas, places of names, and which replica a tenant prefers."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest

from deltakeeper.engine import EngineStats
from deltakeeper.engine.tenant_stats import StoreStats, TenantStats
from deltakeeper.errors import DataError, TenantError
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.cluster_tenants import ClusterTenants
from deltakeeper.service.cluster.messages import Report, Told
from deltakeeper.service.cluster.preference import ranked
from deltakeeper.service.cluster.scaling import Scaling
from deltakeeper.service.cluster.totals import engine_totals, store_totals

ENGINE = EngineStats(1, 2, 10, 4, 3, 100, 7, 5, 50, 60, 20, 1, 0, {"stop": 2}, 9, 1.5, 1.0, ())
COLD = TenantStats("cold", None, 0, 0, 0, False, 0, 0, 0, 0.0, 0, "", 0.0, {})
HELD = replace(
    COLD, state="resident", version="v", resident_bytes=30, pins=1, versions=1, loads=2, evictions={"room": 1}
)


def report(name, tenants, **engine):
    stats = StoreStats(tenants, 64, sum(t.resident_bytes for t in tenants.values()), 0, 1, 1, 0, 2, {}, {"room": 1})
    return Report(Told(name), "node", 1, 64, replace(ENGINE, **engine), stats)


def test_what_is_held_is_that_of_live_replicas_and_what_was_done_is_everybodys():
    live = [report("a", {"x": HELD}), report("b", {"x": COLD, "y": HELD}, finished={"stop": 1, "length": 4})]
    gone = [report("c", {})]
    engine, store = engine_totals(live, gone), store_totals(["x", "y", "z"], live, gone)
    assert (engine.running, engine.kv_blocks, engine.kv_usage) == (2, 20, 0.4)
    assert (engine.answer_tokens, engine.steps, engine.finished) == (60, 27, {"stop": 5, "length": 4})
    assert (store.byte_budget, store.resident_bytes, store.pins) == (128, 60, 2)
    assert (store.loads, store.evictions) == (6, {"room": 3})
    assert {name: one.state for name, one in store.tenants.items()} == {"x": "resident", "y": "resident", "z": "cold"}
    assert store.tenants["x"].version == "v" and store.tenants["z"] == COLD


def test_a_tenant_on_two_replicas_takes_what_both_take():
    both = store_totals(["x"], [report("a", {"x": HELD}), report("b", {"x": HELD})]).tenants["x"]
    assert (both.resident_bytes, both.loads, both.pins, both.evictions) == (60, 4, 2, {"room": 2})


def test_a_load_that_has_ended_when_it_is_noted_holds_up_nobody(tmp_path):
    """It runs on another thread, so it may have failed before anybody could ask to be told."""

    class Watch:
        def run(self, work):
            work.close()
            done = Future()
            done.set_exception(TenantError("a."))
            return done

    catalog = Catalog(tmp_path)
    catalog.register("x", tmp_path / "x")
    tenants = ClusterTenants(Watch(), catalog, tries=1, delta_bytes=1)
    thread = threading.Thread(target=lambda: [tenants.load("x"), tenants.load("x")], daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and not tenants._loading


def test_nobody_is_nothing():
    assert engine_totals([]).finished == {} and store_totals([], []).byte_budget == 0


def test_a_tenant_moves_only_when_its_replica_goes_and_tenants_spread():
    replicas, tenants = [f"r{at}" for at in range(3)], [f"t{at}" for at in range(300)]
    before = {tenant: ranked(tenant, replicas)[0] for tenant in tenants}
    after = {tenant: ranked(tenant, replicas[:2])[0] for tenant in tenants}
    assert all(after[tenant] == where for tenant, where in before.items() if where != "r2")
    assert all(70 < count < 130 for count in Counter(before.values()).values())
    assert ranked("t0", replicas) == ranked("t0", reversed(replicas))


def test_a_name_stands_for_one_place_and_each_turn_is_later_than_all_before(tmp_path):
    catalog = Catalog(tmp_path)
    first = catalog.register("a", tmp_path / "a")
    assert catalog.register("a", tmp_path / "a") == first and catalog.names() == ["a"]
    with pytest.raises(TenantError, match="replace it"):
        catalog.register("a", tmp_path / "b")
    with pytest.raises(TenantError, match="1 or more"):
        catalog.register("b", tmp_path / "b", planes=0)
    turned = catalog.turned("a", tmp_path / "b", 1)
    assert catalog.place("a") == first and turned.generation > first.generation
    catalog.put(turned)
    assert catalog.place("a").path == tmp_path / "b"
    later = Catalog(tmp_path).register("a", tmp_path / "a")
    assert later.generation > turned.generation  # replicas may outlive their ingress
    catalog.remove("a")
    with pytest.raises(TenantError, match="no tenant 'a'"):
        catalog.place("a")
    with pytest.raises(TenantError, match="no tenant"):
        catalog.turned("a", tmp_path, None)


@pytest.mark.parametrize("wrong", [{"min_replicas": 0}, {"max_replicas": 1, "min_replicas": 2}, {"cpus": -1.0}])
def test_limits_that_cannot_be_are_refused(wrong):
    with pytest.raises(DataError, match="give"):
        Scaling(**wrong)
