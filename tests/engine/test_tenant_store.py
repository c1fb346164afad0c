"""The tenant store: pins, swaps, single flight, failures and closing, with real artifacts and threads."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
from store_overlay import FakeOverlay, corrupt, lease_of, poll_until, quiet

from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import ArtifactError, BaseMismatchError, OverlayError, TenantError
from deltakeeper.testing import write_pair

ROOM = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, tuned = write_pair("llama", folder)
    for name, codec in (("one", "bitdelta:scale=row"), ("two", "bitdelta:bits=2"), ("big", "dense")):
        compress(base, tuned, folder / "deltas" / name, codec)
    return folder / "deltas"


@pytest.fixture
def deltas(made, tmp_path):
    return shutil.copytree(made, tmp_path / "deltas")


@pytest.fixture
def overlay():
    return FakeOverlay()


@pytest.fixture
def open_store(overlay, deltas):
    opened = []

    def make(**settings):
        store = TenantStore(overlay, deltas, **({"byte_budget": ROOM} | settings))
        opened.append(store)
        store.scan()
        return store

    yield make
    for gate in overlay.gates.values():
        gate.set()
    for store in opened:
        store.close()


def size_of(folder):
    return sum(record.stored_bytes for record in open_artifact(folder).manifest.tensors.values())


def test_a_tenant_is_loaded_when_asked_for_and_freed_when_unloaded(open_store, overlay, deltas):
    store = open_store()
    assert store.names() == ["big", "one", "two"] and store.state("one") == "cold"
    assert store.acquire("one") is None and store.state("one") == "loading"
    lease = lease_of(store, "one")
    assert overlay.slots[lease.slot] is lease.delta and lease.version == lease.delta.version
    stats = store.stats()
    one = stats.tenants["one"]
    assert (one.state, one.pins, one.loads, one.resident_bytes) == ("resident", 1, 1, lease.delta.nbytes)
    assert one.version == lease.version and one.load_seconds > 0 and one.disk_bytes == size_of(deltas / "one")
    assert (stats.resident_bytes, stats.reserved_bytes, stats.pins) == (lease.delta.nbytes, 0, 1)

    store.unload("one")
    assert store.state("one") == "draining"
    for _ in range(20):
        store.poll()
    assert overlay.slots[lease.slot] is lease.delta and not lease.delta.closed
    lease.release()
    lease.release()
    poll_until(store, lambda: quiet(store, overlay))
    assert store.state("one") == "cold" and lease.delta.closed == 1
    assert store.stats().evictions == {"unloaded": 1}


def test_threads_that_race_for_one_tenant_load_it_once(open_store, overlay):
    store = open_store(loaders=2)
    overlay.gates["one"] = threading.Event()
    barrier, leases, seen = threading.Barrier(8), [], []

    def ask():
        barrier.wait()
        seen.append(store.acquire("one"))
        while (lease := store.acquire("one")) is None:
            time.sleep(0.001)
        leases.append(lease)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    poll_until(store, lambda: len(seen) == 8)
    overlay.gates["one"].set()
    poll_until(store, lambda: len(leases) == 8)
    for thread in threads:
        thread.join()
    assert seen == [None] * 8 and overlay.loads["one"] == 1
    assert {lease.slot for lease in leases} == {leases[0].slot} and store.stats().pins == 8
    for lease in leases:
        lease.release()
    assert store.stats().pins == 0


def test_a_slow_load_holds_up_nobody_else(open_store, overlay):
    store = open_store(loaders=2)
    overlay.gates["big"] = threading.Event()
    overlay.begun["big"] = threading.Event()
    store.acquire("big")
    assert overlay.begun["big"].wait(10)
    lease = lease_of(store, "one")
    began = time.perf_counter()
    for _ in range(1000):
        store.acquire("one").release()
        store.poll()
    assert time.perf_counter() - began < 1 and store.state("big") == "loading"
    assert store.stats().reserved_bytes == store.stats().tenants["big"].disk_bytes
    lease.release()


def test_a_swap_serves_the_old_version_until_the_new_one_is_there_and_then_frees_it(open_store, overlay, deltas):
    store = open_store()
    old = lease_of(store, "one")
    overlay.gates["two"], overlay.begun["two"] = threading.Event(), threading.Event()
    done = store.replace("one", deltas / "two")
    assert overlay.begun["two"].wait(10)
    meanwhile = store.acquire("one")
    assert meanwhile.version == old.version and not done.done()
    overlay.gates["two"].set()
    poll_until(store, done.done)
    new = store.acquire("one")
    assert new.version == done.result() != old.version and new.slot != old.slot
    for _ in range(20):
        store.poll()
    assert overlay.slots[old.slot] is old.delta and not old.delta.closed
    old.release()
    for _ in range(20):
        store.poll()
    assert overlay.slots[old.slot] is old.delta
    meanwhile.release()
    poll_until(store, lambda: old.delta.closed)
    assert overlay.slots == {new.slot: new.delta} and store.stats().tenants["one"].evictions == {"replaced": 1}
    assert store.stats().resident_bytes == new.delta.nbytes

    new.release()
    store.unload("one")
    poll_until(store, lambda: quiet(store, overlay))
    assert lease_of(store, "one").version == new.version  # the name stands for the new source for good


def test_a_swap_that_fails_leaves_the_old_version_serving(open_store, overlay, deltas):
    store = open_store()
    old = lease_of(store, "one")
    corrupt(deltas / "two")
    done = store.replace("one", deltas / "two")
    poll_until(store, done.done)
    with pytest.raises(ArtifactError, match="was altered"):
        done.result()
    again = store.acquire("one")
    assert again.version == old.version and store.stats().resident_bytes == old.delta.nbytes
    assert store.stats().failures == {"ArtifactError": 1} and len(overlay.held) == 1
    again.release(), old.release()
    store.unload("one")
    poll_until(store, lambda: quiet(store, overlay))
    assert lease_of(store, "one").version == old.version


def test_the_last_of_several_swaps_wins(open_store, overlay, deltas):
    store = open_store(loaders=2)
    overlay.gates["two"], overlay.begun["two"] = threading.Event(), threading.Event()
    first = store.replace("one", deltas / "two")
    assert overlay.begun["two"].wait(10)
    last = store.replace("one", deltas / "big")
    with pytest.raises(TenantError, match="another version was asked for"):
        first.result(0)
    poll_until(store, last.done)
    overlay.gates["two"].set()
    poll_until(store, lambda: store.stats().tenants["one"].versions == 1)
    with lease_of(store, "one") as lease:
        assert lease.version == last.result() and lease.delta.side_folder == deltas / "big"
    assert overlay.held == [lease.delta] and store.stats().reserved_bytes == 0


def test_an_altered_payload_leaves_nothing_behind_and_is_served_once_it_is_repaired(open_store, overlay, deltas):
    now = [100.0]
    store = open_store(loaders=0, backoff_seconds=1.0, backoff_limit=3.0, clock=lambda: now[0])
    good = shutil.copytree(deltas / "one", deltas.parent / "good")
    corrupt(deltas / "one")
    waits = []
    for attempt in range(1, 5):
        assert store.acquire("one") is None
        poll_until(store, lambda: store.state("one") == "failed")
        assert quiet(store, overlay) and overlay.loads["one"] == attempt
        with pytest.raises(TenantError, match=r"'one' could not be loaded and is tried again in .* was altered; get"):
            store.acquire("one")
        waits.append(store.stats().tenants["one"].retry_seconds)
        now[0] += waits[-1] - 0.01
        with pytest.raises(TenantError):
            store.acquire("one")
        now[0] += 0.02
    assert waits == pytest.approx([1, 2, 3, 3])
    shutil.copytree(good, deltas / "one", dirs_exist_ok=True)
    lease = lease_of(store, "one")
    one = store.stats().tenants["one"]
    assert (one.state, one.reason, one.failures, one.retry_seconds) == ("resident", "", 4, 0)
    lease.release()


def test_an_operator_may_load_before_the_back_off_ends(open_store, deltas):
    store = open_store(backoff_seconds=1000)
    shutil.move(deltas / "one", deltas.parent / "away")
    done = store.load("one")
    poll_until(store, done.done)
    with pytest.raises(ArtifactError, match=r"holds no delta_config\.json"):
        done.result()
    with pytest.raises(TenantError, match="tried again"):
        store.acquire("one")
    shutil.move(deltas.parent / "away", deltas / "one")
    done = store.load("one")
    assert store.load("one") is done and not done.cancel()
    poll_until(store, done.done)
    assert store.load("one").result(0) == done.result() == store.stats().tenants["one"].version


@pytest.mark.parametrize("error", [OverlayError("No slot is free."), ValueError("odd")])
def test_a_delta_that_cannot_be_published_is_freed(open_store, overlay, error):
    store = open_store()
    overlay.publish_error = error
    done = store.load("one")
    poll_until(store, lambda: done.done() and quiet(store, overlay))
    with pytest.raises((OverlayError, TenantError), match=str(error)):
        done.result()
    assert store.state("one") == "failed" and overlay.deltas[0].closed == 1


def test_an_artifact_of_another_base_is_refused_before_it_is_read(open_store, overlay, deltas):
    root = open_artifact(deltas / "one").manifest.base.root
    store = open_store(base_root="f" * 64)
    done = store.load("one")
    poll_until(store, done.done)
    with pytest.raises(BaseMismatchError, match=f"{root[:12]}.*not the base that is served.*ffffffffffff"):
        done.result()
    with pytest.raises(TenantError, match="not the base that is served"):
        store.acquire("one")
    assert not overlay.loads and quiet(store, overlay)
    assert lease_of(open_store(base_root=root), "two").slot == 1


def test_unknown_names_and_odd_names_are_refused(open_store, deltas, tmp_path):
    store = open_store()
    for call in (store.acquire, store.load, store.unload, store.remove, store.state):
        with pytest.raises(TenantError, match="no tenant 'nobody'"):
            call("nobody")
    with pytest.raises(TenantError, match="no tenant 'nobody'"):
        store.replace("nobody", deltas / "one")
    for name in ("", ".", "..", ".hidden", "a/b", "a b", "é", "a\n", "x" * 129, "../one", "a.attestation.json"):
        with pytest.raises(TenantError, match="cannot be the name of a tenant"):
            store.register(name, deltas / "one")
    store.register("x" * 128, deltas / "one")
    store.register("one", deltas / "one")  # the same again
    for source in ({"path": deltas / "two"}, {"path": deltas / "one", "planes": 1}):
        with pytest.raises(TenantError, match="'one' is served from"):
            store.register("one", **source)
    with pytest.raises(TenantError, match="0 planes"):
        store.register("none", deltas / "one", planes=0)
    with pytest.raises(TenantError, match="cannot be listed"):
        store.scan(tmp_path / "nowhere")
    for settings in ({"byte_budget": 0}, {"loaders": -1}, {"max_resident": 0}, {"grace_seconds": float("nan")}):
        with pytest.raises(TenantError, match=next(iter(settings))):
            TenantStore(FakeOverlay(), **({"byte_budget": 1} | settings))


def test_a_scan_finds_new_folders_and_names_the_odd_one(open_store, deltas, tmp_path):
    store = open_store()
    shutil.copytree(deltas / "one", deltas / "zed")
    shutil.copytree(deltas / "one", deltas / ".zed-half-written")
    (deltas / "no artifact").mkdir()
    assert store.scan() == ["zed"] and store.scan() == []
    shutil.copytree(deltas / "one", deltas / "an odd one")
    shutil.copytree(deltas / "one", deltas / "later")
    with pytest.raises(TenantError, match=r"an odd one is left out.*cannot be the name"):
        store.scan()
    assert store.names() == ["big", "later", "one", "two", "zed"]
    with pytest.raises(TenantError, match="no folder to scan"):
        TenantStore(FakeOverlay(), byte_budget=1, loaders=0).scan()


def test_a_removed_name_is_gone_at_once_and_its_memory_with_the_last_pin(open_store, overlay, deltas):
    store = open_store()
    lease = lease_of(store, "one")
    store.remove("one")
    with pytest.raises(TenantError, match="no tenant"):
        store.acquire("one")
    assert store.stats().resident_bytes == lease.delta.nbytes and "one" not in store.stats().tenants
    store.register("one", deltas / "two")
    with lease_of(store, "one") as other:
        assert other.version != lease.version and overlay.slots[lease.slot] is lease.delta
    lease.release()
    poll_until(store, lambda: lease.delta.closed)
    assert store.stats().resident_bytes == other.delta.nbytes


@pytest.mark.parametrize("stage", ["reading", "loaded", "pinned", "queued"])
def test_closing_ends_loads_wherever_they_are_and_frees_all(open_store, overlay, deltas, stage):
    store = open_store()
    lease = lease_of(store, "two") if stage == "pinned" else None
    gate, begun = threading.Event(), threading.Event()
    overlay.gates["one"], overlay.begun["one"] = gate, begun
    done = store.load("one")
    queued = store.load("big") if stage == "queued" else None
    assert begun.wait(10)
    if stage == "loaded":
        gate.set()
        end = time.monotonic() + 10
        while not store.stats().resident_bytes and time.monotonic() < end:
            time.sleep(0.001)
    closer = threading.Timer(0.05, gate.set)
    closer.start()
    store.close()
    closer.join()
    assert quiet(store, overlay) and all(delta.closed == 1 for delta in overlay.deltas)
    for future in (done, queued):
        if future is not None:
            with pytest.raises(TenantError, match="store was closed"):
                future.result(0)
    assert overlay.loads["big"] == 0
    if lease is not None:
        lease.release()
    store.close()
    store.poll()
    assert quiet(store, overlay) and not [t for t in threading.enumerate() if t.name.startswith("tenant-loader")]
    with pytest.raises(TenantError, match="is closed"):
        store.acquire("one")


def test_a_load_nobody_wants_stops_at_the_next_tensor(open_store, overlay):
    store = open_store()
    overlay.gates["one"], overlay.begun["one"] = threading.Event(), threading.Event()
    done = store.load("one")
    assert overlay.begun["one"].wait(10)
    store.unload("one")
    with pytest.raises(TenantError, match="was unloaded"):
        done.result(0)
    overlay.gates["one"].set()
    poll_until(store, lambda: quiet(store, overlay))
    assert not overlay.deltas and store.stats().failures == {} and store.state("one") == "cold"


@pytest.mark.parametrize("again", [False, True])
def test_a_version_unloaded_while_it_is_published_serves_nobody(open_store, overlay, again):
    store = open_store()

    def unload():
        overlay.while_publishing = None
        store.unload("one")
        if again:
            assert store.acquire("one") is None

    overlay.while_publishing = unload
    done = store.load("one")
    poll_until(store, done.done)
    with pytest.raises(TenantError, match="was unloaded"):
        done.result(0)
    poll_until(store, lambda: overlay.deltas[0].closed)
    if again:
        lease_of(store, "one").release()
        store.unload("one")
    poll_until(store, lambda: quiet(store, overlay))
    assert overlay.loads["one"] == 1 + again and store.state("one") == "cold"


def test_the_engine_is_woken_when_a_load_ends(open_store):
    store = open_store()
    woken = threading.Event()
    store.on_work(woken.set)
    store.acquire("one")
    assert woken.wait(10) and store.state("one") == "loading"
    store.poll()
    assert store.state("one") == "resident"


def test_a_loader_outlives_a_delta_that_cannot_be_closed(open_store, overlay, caplog):
    store = open_store()
    lease_of(store, "one").release()
    overlay.close_fails = True
    store.unload("one")
    poll_until(store, lambda: quiet(store, overlay) and "cannot close" in caplog.text)
    overlay.close_fails = False
    lease_of(store, "two").release()
