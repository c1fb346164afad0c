"""Who is let in: bytes and places are reserved first, the idle make room, the pinned stay, and nobody starves."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time

import pytest
from store_overlay import FakeOverlay, lease_of, poll_until, quiet

from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine.store import TenantStore
from deltakeeper.engine.tenant_admission import OVERTAKES
from deltakeeper.engine.tenant_files import payload_bytes, read_ahead
from deltakeeper.errors import TenantError
from deltakeeper.testing import write_pair


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deltas")
    base, tuned = write_pair("llama", folder)
    compress(base, tuned, folder / "first", "bitdelta:scale=row")
    compress(base, tuned, folder / "big", "dense")
    compress(base, tuned, folder / "planes", "bitdelta:bits=2")
    found = folder / "deltas"
    for name in "abcdef":
        shutil.copytree(folder / "first", found / name)
    for name in ("big", "planes"):
        (folder / name).rename(found / name)
    return found


@pytest.fixture(scope="module")
def size(deltas):
    return payload_bytes(open_artifact(deltas / "a"), None)


@pytest.fixture
def overlay():
    return FakeOverlay()


@pytest.fixture
def open_store(overlay, deltas):
    opened = []

    def make(budget, **settings):
        opened.append(TenantStore(overlay, deltas, **({"byte_budget": budget, "grace_seconds": 0} | settings)))
        opened[-1].scan()
        return opened[-1]

    yield make
    for gate in overlay.gates.values():
        gate.set()
    for store in opened:
        store.close()


def residents(store):
    return [name for name in store.names() if store.state(name) == "resident"]


def play(store, seconds=0.1):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        store.poll()


def test_the_least_recently_used_idle_resident_makes_room(open_store, overlay, size):
    store = open_store(3 * size)
    pinned = lease_of(store, "a")
    for name in "bc":
        lease_of(store, name).release()
    lease_of(store, "b").release()
    lease_of(store, "d").release()
    assert residents(store) == ["a", "b", "d"] and store.stats().evictions == {"room": 1}
    assert store.stats().resident_bytes == 3 * size
    pinned.release()
    lease_of(store, "c").release()
    assert residents(store) == ["a", "c", "d"]  # a was used until a moment ago


def test_what_can_never_fit_is_refused_and_evicts_nobody(open_store, overlay, deltas, size):
    store = open_store(2 * size)
    lease_of(store, "a").release()
    done = store.load("big")
    poll_until(store, done.done)
    big = payload_bytes(open_artifact(deltas / "big"), None)
    with pytest.raises(
        TenantError, match=rf"big needs {big:,} bytes and the budget of all tenants is {2 * size:,}; ra"
    ):
        done.result()
    with pytest.raises(TenantError, match="raise the budget"):
        store.acquire("big")
    assert residents(store) == ["a"] and overlay.loads["big"] == 0 and store.stats().reserved_bytes == 0


def test_a_load_waits_for_pins_and_evicts_nobody_in_vain(open_store, overlay, deltas, size):
    big = payload_bytes(open_artifact(deltas / "big"), None)
    store = open_store(big)
    pinned = lease_of(store, "a")
    lease_of(store, "b").release()
    assert store.acquire("big") is None
    play(store)
    assert store.acquire("big") is None and residents(store) == ["a", "b"] and store.stats().waiting == 1
    pinned.release()
    lease_of(store, "big").release()
    assert residents(store) == ["big"] and overlay.loads["big"] == 1


def test_small_loads_pass_one_that_waits_but_not_for_ever(open_store, overlay, deltas, size):
    big = payload_bytes(open_artifact(deltas / "big"), None)
    store = open_store(big)
    pinned = lease_of(store, "a")
    store.acquire("big")
    poll_until(store, lambda: store.stats().waiting == 1)
    for k in range(OVERTAKES):
        lease_of(store, "bc"[k % 2]).release()
        store.unload("bc"[k % 2])
    store.acquire("d")
    play(store)
    assert store.state("d") == "loading" and overlay.loads["d"] == 0 and store.stats().waiting == 2
    pinned.release()
    lease_of(store, "big").release()
    lease_of(store, "d").release()


def test_a_new_version_is_kept_for_the_request_that_it_was_loaded_for(open_store, size):
    now = [0.0]
    store = open_store(size, loaders=0, grace_seconds=2, clock=lambda: now[0])
    store.acquire("a")
    poll_until(store, lambda: store.state("a") == "resident")
    store.acquire("b")
    play(store)
    assert residents(store) == ["a"]
    lease = store.acquire("a")
    lease.release()
    poll_until(store, lambda: store.state("b") == "resident")  # a has had its request
    store.acquire("a")
    play(store)
    assert residents(store) == ["b"]
    now[0] += 2.1  # nobody came for b
    poll_until(store, lambda: store.state("a") == "resident")


def test_places_are_limited_beside_bytes(open_store, overlay, size):
    store = open_store(100 * size, max_resident=2)
    one, two = lease_of(store, "a"), lease_of(store, "b")
    store.acquire("c")
    play(store)
    assert len(overlay.slots) == 2 and store.stats().waiting == 1
    one.release()
    lease_of(store, "c").release()
    assert residents(store) == ["b", "c"] and store.stats().residents == 2
    two.release()


@pytest.mark.parametrize("limit", [{"budget": 1}, {"budget": 99, "max_resident": 1}])
def test_a_swap_that_does_not_fit_beside_the_old_version_goes_after_it(open_store, overlay, deltas, size, limit):
    store = open_store(limit["budget"] * size + size // 2, **{k: v for k, v in limit.items() if k != "budget"})
    old = lease_of(store, "a")
    done = store.replace("a", deltas / "b")
    play(store)
    assert store.acquire("a") is None and overlay.slots == {old.slot: old.delta} and not done.done()
    old.release()
    poll_until(store, done.done)
    with lease_of(store, "a") as new:
        assert new.delta.side_folder == deltas / "b" and old.delta.closed
    assert store.stats().resident_bytes == size


def test_a_version_that_makes_room_for_another_and_for_its_own_successor_is_retired_once(
    open_store, overlay, deltas, size
):
    now = [0.0]
    store = open_store(9 * size, max_resident=1, loaders=0, grace_seconds=2.0, clock=lambda: now[0])
    loads = [store.load("a")]
    poll_until(store, loads[0].done)
    loads.append(store.load("b"))
    play(store)
    assert not loads[1].done()  # the resident is too young to go
    now[0] += 3.0
    loads.append(store.replace("a", deltas / "a"))  # found waiting behind "b" by the first look after that
    play(store)
    now[0] += 3.0
    play(store)
    assert all(future.result() for future in loads)


def test_a_delta_larger_than_its_payload_takes_what_it_needs(open_store, overlay, size):
    overlay.growth["a"] = 1.5
    store = open_store(2 * size)
    lease_of(store, "b").release()
    lease = lease_of(store, "a")
    assert lease.delta.nbytes == size * 3 // 2 == store.stats().resident_bytes and residents(store) == ["a"]
    lease.release()
    assert overlay.loads["a"] == 1


def test_a_delta_that_grew_over_pinned_ones_is_put_down_and_read_again(open_store, overlay, size):
    overlay.growth["a"] = 1.5
    store = open_store(2 * size)
    pinned = lease_of(store, "b")
    store.acquire("a")
    poll_until(store, lambda: overlay.deltas[-1].closed and store.stats().reserved_bytes == 0)
    play(store)
    assert overlay.loads["a"] == 1 and store.stats().waiting == 1 and store.stats().resident_bytes == size
    pinned.release()
    lease_of(store, "a").release()
    assert overlay.loads["a"] == 2
    store.unload("a")
    poll_until(store, lambda: quiet(store, overlay))
    pinned = lease_of(store, "b")
    store.acquire("a")
    play(store)
    assert overlay.loads["a"] == 2  # its true size is known by now
    pinned.release()
    lease_of(store, "a").release()


def test_a_delta_that_grew_past_the_budget_is_refused(open_store, overlay, size):
    overlay.growth["a"] = 5
    store = open_store(2 * size)
    done = store.load("a")
    poll_until(store, lambda: done.done() and quiet(store, overlay))
    with pytest.raises(TenantError, match=f"needs {5 * size:,} bytes"):
        done.result()


def test_only_the_planes_that_are_served_are_counted(open_store, deltas):
    artifact = open_artifact(deltas / "planes")
    two, one = payload_bytes(artifact, None), payload_bytes(artifact, 1)
    assert two == payload_bytes(artifact, 2) == sum(r.stored_bytes for r in artifact.manifest.tensors.values())
    terms = [term for name in artifact.names for term in artifact.terms(name)]
    kept = [term.with_planes(1) if term.name == "signs" else term for term in terms]
    assert one == sum(term.nbytes for term in kept) < two


def test_reading_ahead_asks_for_the_files_and_is_only_advice(open_store, overlay, deltas, tmp_path, monkeypatch, size):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: advised.append(os.fstat(fd).st_size))
    store = open_store(100 * size)
    store.register("gone", tmp_path / "gone")
    store.prefetch(["a", "nobody", "gone", "a", "b"])
    poll_until(store, lambda: len(advised) >= 4)
    files = ("delta_config.json", "delta_model.safetensors")
    assert sorted(advised) == sorted((deltas / name / file).stat().st_size for name in "ab" for file in files)
    assert store.stats().tenants["a"].read_ahead and not overlay.loads
    lease_of(store, "a").release()
    store.prefetch("a")  # in memory already
    play(store, 0.05)
    assert len(advised) == 4 and not store.stats().tenants["a"].read_ahead
    assert read_ahead(deltas / "a", 10) == 0 and read_ahead(tmp_path / "gone", 1 << 30) == 0
    os.mkfifo(tmp_path / "delta_model.safetensors")
    (tmp_path / "delta_config.json").write_text("{}")
    assert read_ahead(tmp_path, 1 << 30) == 0  # and does not wait for the pipe's other end


def test_a_poll_is_short_when_there_is_nothing_to_do_and_with_many_tenants(open_store, deltas, size):
    store = open_store(1 << 30, loaders=0)
    for k in range(300):
        store.register(f"t{k}", deltas / "a")
    leases = [lease_of(store, f"t{k}") for k in range(40)]
    spent = []
    for _ in range(2000):
        began = time.perf_counter()
        store.poll()
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[1000] < 2e-5
    for lease in leases:
        lease.release()


def test_a_storm_of_threads_keeps_the_books(open_store, overlay, deltas, size):
    """Requests on four threads, the engine on this one: pinned stay, bytes hold, and all comes back to nothing."""
    overlay.growth["c"] = 1.3
    budget = 3 * size
    store = open_store(budget, loaders=2)
    ends, wrong = time.monotonic() + 3, []

    def requests(seed):
        rng, leases = random.Random(seed), []
        try:
            while time.monotonic() < ends:
                if leases and (len(leases) > 1 or rng.random() < 0.5):
                    lease = leases.pop(rng.randrange(len(leases)))
                    assert overlay.slots[lease.slot] is lease.delta and not lease.delta.closed
                    lease.release()
                elif rng.random() < 0.02:
                    store.unload(rng.choice("abcdef"))
                elif rng.random() < 0.02:
                    store.replace(rng.choice("abcdef"), deltas / rng.choice("abcdef"))
                elif lease := store.acquire(rng.choice("abcdef")):
                    leases.append(lease)
                time.sleep(0.0005)
            for lease in leases:
                lease.release()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=requests, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.poll()
        stats = store.stats()
        assert stats.resident_bytes + stats.reserved_bytes <= budget
        rows = stats.tenants.values()
        assert stats.resident_bytes == sum(row.resident_bytes for row in rows)
        assert stats.reserved_bytes == sum(row.reserved_bytes for row in rows)
    assert not wrong
    assert store.stats().loads > 10 and store.stats().evictions["room"] > 5
    poll_until(store, lambda: not [name for name in "abcdef" if store.state(name) == "loading"])
    for name in "abcdef":
        store.unload(name)
    poll_until(store, lambda: quiet(store, overlay))
    assert all(delta.closed == 1 for delta in overlay.deltas)
