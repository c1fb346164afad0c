"""The tenant store against a model of it: any order of requests, swaps, failures and time keeps the books."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from store_overlay import FakeOverlay, quiet

from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine.store import TenantStore
from deltakeeper.engine.tenant_files import payload_bytes
from deltakeeper.errors import ArtifactError, OverlayError, TenantError
from deltakeeper.testing import write_pair

NAMES = ("a", "b", "c", "d", "wide", "huge")


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    base, tuned = write_pair("llama", folder)
    compress(base, tuned, folder / "deltas" / "a", "bitdelta:scale=row")
    compress(base, tuned, folder / "deltas" / "wide", "svd:rank=8")
    compress(base, tuned, folder / "deltas" / "huge", "dense")
    for name in "bcd":
        shutil.copytree(folder / "deltas" / "a", folder / "deltas" / name)
    return folder / "deltas"


class BreakableOverlay(FakeOverlay):
    """Refuses to load the folders in `broken`."""

    def __init__(self):
        super().__init__()
        self.broken = set()

    def load(self, artifact, *, planes=None):
        if artifact.path.name in self.broken:
            raise ArtifactError(f"{artifact.path.name} is broken.")
        return super().load(artifact, planes=planes)


class Machine(RuleBasedStateMachine):
    deltas = None

    def __init__(self):
        super().__init__()
        size = payload_bytes(open_artifact(self.deltas / "a"), None)
        self.budget = size * 7 // 2
        self.now = 0.0
        self.overlay = BreakableOverlay()
        self.overlay.growth["b"] = 1.4
        self.store = TenantStore(
            self.overlay, self.deltas, byte_budget=self.budget, loaders=0, max_resident=3, clock=lambda: self.now
        )
        self.store.scan()
        self.leases = []
        self.futures = []

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name):
        state = self.store.state(name)
        try:
            lease = self.store.acquire(name)
        except TenantError:
            assert state in ("failed", "draining")
        else:
            assert (lease is not None) == (state == "resident")
            if lease:
                self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).release()

    @rule(times=st.integers(1, 4))
    def poll(self, times):
        for _ in range(times):
            self.store.poll()

    @rule(name=st.sampled_from(NAMES), source=st.sampled_from(NAMES))
    def replace(self, name, source):
        self.futures.append(self.store.replace(name, self.deltas / source))

    @rule(name=st.sampled_from(NAMES))
    def load(self, name):
        self.futures.append(self.store.load(name))

    @rule(name=st.sampled_from(NAMES), forget=st.booleans())
    def unload(self, name, forget):
        if forget:
            self.store.remove(name)
            self.store.register(name, self.deltas / name)
        else:
            self.store.unload(name)

    @rule(name=st.sampled_from(NAMES))
    def break_or_mend(self, name):
        self.overlay.broken ^= {name}

    @rule(full=st.booleans())
    def fill_or_free_slots(self, full):
        self.overlay.publish_error = OverlayError("No slot is free.") if full else None

    @rule(seconds=st.sampled_from([0.5, 2.5, 100.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def the_books_hold(self):
        stats = self.store.stats()
        assert stats.resident_bytes >= 0 and stats.reserved_bytes >= 0
        assert stats.resident_bytes + stats.reserved_bytes <= self.budget and 0 <= stats.residents <= 3
        assert sum(delta.nbytes for delta in self.overlay.slots.values()) <= stats.resident_bytes
        assert stats.pins == len(self.leases)
        assert sum(row.resident_bytes for row in stats.tenants.values()) <= stats.resident_bytes

    @invariant()
    def what_is_pinned_stays(self):
        for lease in self.leases:
            assert self.overlay.slots[lease.slot] is lease.delta and not lease.delta.closed

    def settle(self, done):
        for _ in range(400):
            if done():
                return
            self.store.poll()
            self.now += 0.1
        raise AssertionError(f"nothing moves: {self.store.stats()}")

    def teardown(self):
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        self.overlay.broken.clear()
        self.overlay.publish_error = None
        self.settle(lambda: all(future.done() for future in self.futures))  # a name that is replaced stays resident
        self.settle(lambda: not [name for name in NAMES if self.store.state(name) == "loading"])
        self.now += 100  # every name that fits can still be served
        for name in NAMES:
            self.store.remove(name)
            self.store.register(name, self.deltas / name)
            future = self.store.load(name)
            self.settle(future.done)
            assert isinstance(future.exception(), TenantError) if name == "huge" else future.result()
        for name in NAMES:
            self.store.unload(name)
        self.settle(lambda: quiet(self.store, self.overlay))
        assert all(delta.closed == 1 for delta in self.overlay.deltas)
        self.store.close()


def test_any_order_of_events_keeps_the_books(deltas):
    Machine.deltas = deltas
    checks = settings(max_examples=40, stateful_step_count=40, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=checks)
