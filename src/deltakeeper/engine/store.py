"""The tenant store: which deltas are in memory, which are on their way, and which have to go.

Versions: a name stands for one version at a time. A request pins the version that it starts with and keeps it to its
last token; a swap loads the new version beside the old one, turns the name over in one step, and frees the old one with
its last pin.

Threads: the engine calls `poll` between its passes, and only there does the live model change. Headers, tensors and
hashes are read on loader threads, memory is given back there too, and no lock is held meanwhile.

Bytes: a load reserves what the headers say (or what the same artifact really held last time) before it reads; a delta
is counted by its own `nbytes` afterwards, until its memory is given back. Reserved and resident bytes together never
pass the budget. A delta that turns out larger than its reservation waits with its memory for as long as idle residents
can make room, and is read again later if they cannot; only in this time is more held than is counted.

Tiers: resident, the system's page cache, disk. There is no copy of our own in between: on the CPU it would cost the
memory that the resident tier is short of, while cached pages are given up when memory is short. `prefetch` asks for
them.

Every load hashes what it reads, one that was read before too: an unchanged inode, size and modification time do not
prove unchanged bytes (they can be set, and a bad disk does not touch them), and the hash is what ties the tokens served
to the manifest. It costs 0.56 s a GB a thread with SHA instructions (1.8 GB/s, where the read from the page cache takes
0.17 s), on a loader thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType

from deltakeeper.engine.lease import Lease
from deltakeeper.engine.tenant_files import artifact_folders, check_name, read_ahead
from deltakeeper.engine.tenant_jobs import AHEAD
from deltakeeper.engine.tenant_lifecycle import Lifecycle
from deltakeeper.engine.tenant_records import Source, State, StoreSettings, Tenant, TenantOverlay, Version
from deltakeeper.engine.tenant_stats import Snapshot, StoreStats, state_of
from deltakeeper.errors import TenantError, UnusableError


class TenantStore:
    """Deltas by name, loaded when they are asked for and evicted when others need the room; safe on any thread.

    Args:
        overlay: the live model's overlay.
        folder: what `scan` looks through, if anything.
        byte_budget: bytes of all deltas together, in memory or being loaded.
        loaders: threads that load; with 0 each `poll` runs one step of a load itself, for offline use.
        base_root: fingerprint of the base; artifacts of another are refused.
        max_resident: deltas at a time, None for as many as fit.
        backoff_seconds: how long a name is refused after a load that failed; twice as long after each further one.
        backoff_limit: the longest that it is.
        grace_seconds: how long a new version is kept for the request that it was loaded for to come and pin it; with
            0, more cold tenants than there is room for evict each other before any of them is used.
        clock: monotonic seconds, for the back-off and the grace.

    Raises:
        TenantError: a limit is out of range.
    """

    def __init__(
        self,
        overlay: TenantOverlay,
        folder: Path | None = None,
        *,
        byte_budget: int,
        loaders: int = 1,
        base_root: str | None = None,
        max_resident: int | None = None,
        backoff_seconds: float = 1.0,
        backoff_limit: float = 60.0,
        grace_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = StoreSettings(
            byte_budget, loaders, base_root, max_resident, backoff_seconds, backoff_limit, grace_seconds
        )
        self.folder = folder
        self._life = Lifecycle(overlay, settings, clock)
        self._lock = self._life.lock
        self._tenants: dict[str, Tenant] = {}
        self._uses = count(1)
        self._clock = clock

    @property
    def max_delta_bytes(self) -> int:
        """Most bytes of one delta: the budget of all."""
        return self._life.ledger.budget

    def register(self, name: str, path: Path, *, planes: int | None = None) -> None:
        """Make a tenant known, cold; nothing is read. The same again changes nothing.

        Args:
            name: 1 to 128 of the characters A-Z a-z 0-9 . _ - without a dot in front.
            path: folder of its artifact.
            planes: sign planes that are served; None for all.

        Raises:
            TenantError: the name is malformed or taken by another source, or the store is closed.
        """
        source = _source(path, planes)
        with self._lock:
            self._add(check_name(name), source)

    def scan(self, folder: Path | None = None) -> list[str]:
        """Make every subfolder that holds an artifact known by its name, and say which names are new.

        Names whose folders are gone stay known, and names that are known keep their source.

        Raises:
            TenantError: there is no folder, or a subfolder has a name that no tenant may have, in which case the others
                are known all the same.
        """
        folder = self.folder if folder is None else folder
        if folder is None:
            raise TenantError("The tenant store has no folder to scan; give one.")
        found, refused = [], None
        for path in artifact_folders(folder):
            try:
                name = check_name(path.name)
            except TenantError as error:
                refused = refused or TenantError(f"{path} is left out: {error}")
                continue
            with self._lock:
                if name not in self._tenants:
                    self._add(name, _source(path, None))
                    found.append(name)
        if refused is not None:
            raise refused
        return found

    def names(self) -> list[str]:
        """All known names, sorted."""
        with self._lock:
            return sorted(self._tenants)

    def state(self, name: str) -> State:
        """State of a tenant; raises TenantError for an unknown one."""
        with self._lock:
            tenant = self._known(name)
            stages = (v.stage for v in self._life.live if v.tenant is tenant)
            return state_of(tenant.current is not None, tenant.incoming is not None, stages, tenant.reason)

    def source(self, name: str) -> Source:
        """What the next load of a tenant reads; raises TenantError for an unknown one."""
        with self._lock:
            return self._known(name).source

    def acquire(self, name: str) -> Lease | None:
        """Pin the version that a tenant has now, or see to it that one is loaded and give None: ask again later.

        However many ask, one load is under way. To ask costs microseconds.

        Raises:
            TenantError: the name is unknown, its last load failed and is not tried again yet, or the store is closed.
            UnusableError: that load failed for what the files are, or for their size.
        """
        with self._lock:
            tenant = self._known(name)
            version = tenant.current
            if version is not None:
                assert version.delta is not None
                version.pins += 1
                version.last_used = next(self._uses)
                version.fresh_until = 0.0
                return Lease(version, version.delta, self._unpin)
            if tenant.incoming is None:
                wait = tenant.retry_at - self._clock()
                if tenant.reason and wait > 0:
                    kind = UnusableError if tenant.unusable else TenantError
                    raise kind(
                        f"Tenant '{name}' could not be loaded and is tried again in {wait:.1f} s: {tenant.reason}"
                    )
                self._life.begin(tenant, tenant.source)
            return None

    def load(self, name: str) -> Future[str]:
        """Load a tenant without pinning it, back-off or not; the future gives its version once it is published.

        The future raises what the load failed with (ArtifactError, BaseMismatchError, OverlayError, TenantError).

        Raises:
            TenantError: the name is unknown, or the store is closed.
        """
        with self._lock:
            tenant = self._known(name)
            if tenant.incoming is not None:
                return tenant.incoming.done
            if tenant.current is not None and tenant.current.delta is not None:
                present: Future[str] = Future()
                present.set_result(tenant.current.delta.version)
                return present
            return self._life.begin(tenant, tenant.source).done

    def replace(self, name: str, path: Path, *, planes: int | None = None) -> Future[str]:
        """Load another artifact for a name, and turn the name over to it in one step once it is loaded.

        Running requests keep the version that they have pinned. Until the new one is published the old one serves new
        requests; if the load fails it goes on doing so. Where both do not fit in the budget together, the old one gets
        no new requests, and goes first. A load that is under way for the name is given up.

        Returns:
            The future of the new version, as with `load`.

        Raises:
            TenantError: the name is unknown, or the store is closed.
        """
        source = _source(path, planes)
        with self._lock:
            tenant = self._known(name)
            if tenant.incoming is not None:
                self._life.abandon(tenant.incoming, "another version was asked for")
            version = self._life.begin(tenant, source)
        self._life.announce()
        return version.done

    def stage(self, name: str, path: Path, *, planes: int | None = None) -> Future[Lease]:
        """Load another artifact for a name beside what it stands for; the future gives a pin on it.

        Nothing is turned over: that is `turn_over`, and `discard` takes it back. Whoever asked does one of them.
        Where both versions do not fit in the budget together the old one goes first, as with `replace`.

        Raises:
            TenantError: the name is unknown, or the store is closed.
        """
        source = _source(path, planes)
        with self._lock:
            version = self._life.begin(self._known(name), source, staged=True)
        found: Future[Lease] = Future()
        found.set_running_or_notify_cancel()

        def end(done: Future[str]) -> None:
            error, delta = done.exception(), version.delta
            if error is not None:
                found.set_exception(error)
            else:
                assert delta is not None
                found.set_result(Lease(version, delta, self._unpin))

        version.done.add_done_callback(end)
        return found

    def turn_over(self, lease: Lease) -> None:
        """Let a name stand for a version that was staged, in one step; the lease is still to be released.

        Raises:
            TenantError: the name was removed meanwhile, or the store is closed.
        """
        with self._lock:
            tenant = lease.record.tenant
            if self._known(tenant.name) is not tenant or lease.released:
                raise TenantError(f"Tenant '{tenant.name}' was removed while another version of it was loaded.")
            if tenant.incoming is not None:
                self._life.abandon(tenant.incoming, "another version took its place")
            self._life.turn_over(lease.record)
        self._life.announce()

    def discard(self, lease: Lease) -> None:
        """Free a version that was staged, with its last pin; the lease is still to be released."""
        with self._lock:
            if lease.record.stage == "published" and lease.record.tenant.current is not lease.record:
                self._life.drain(lease.record, "unloaded")

    def unload(self, name: str) -> None:
        """Free a tenant's memory with its last pin; the name stays known, and the next request loads it again.

        Raises:
            TenantError: the name is unknown, or the store is closed.
        """
        with self._lock:
            self._let_go(self._known(name), "unloaded")
        self._life.announce()

    def remove(self, name: str) -> None:
        """Forget a name: no new request is served, and its memory is freed with its last pin.

        Raises:
            TenantError: the name is unknown, or the store is closed.
        """
        with self._lock:
            self._let_go(self._known(name), "removed")
            del self._tenants[name]
        self._life.announce()

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the files of tenants that are not in memory read into the page cache; advice, so nothing is raised."""
        with self._lock:
            for name in names:
                tenant = self._tenants.get(name)
                if tenant is None or tenant.read_ahead or tenant.current or tenant.incoming:
                    continue
                tenant.read_ahead = True
                path, limit = tenant.source.path, self._life.ledger.budget
                self._life.jobs.put(AHEAD, partial(read_ahead, path, limit))

    def poll(self) -> None:
        """Publish the loads that have ended and retire what has to go; called between passes, on the engine's thread.

        It begins nothing more after half a millisecond, and costs well under a microsecond when there is nothing to do.
        """
        self._life.poll()

    def on_work(self, wake: Callable[[], None] | None) -> None:
        """Have `wake` called, on a loader thread, whenever `poll` has something to do; for an engine that sleeps."""
        self._life.wake = wake

    def stats(self) -> StoreStats:
        """Counts of this moment."""
        life = self._life
        with self._lock:
            counts = (len(life.waiting), life.loads, life.failures, life.evictions)
            snapshot = Snapshot(self._tenants.values(), life.live, life.ledger, *counts)
        return snapshot.stats(self._clock())

    def close(self) -> None:
        """End the loaders and free everything; called when no pass runs and no request will, since pins do not hold it.

        A tensor that is being read is read to its end first.
        """
        self._life.close()

    def __enter__(self) -> TenantStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _known(self, name: str) -> Tenant:
        self._check_open()
        tenant = self._tenants.get(name)
        if tenant is None:
            raise TenantError(f"There is no tenant {name[:140]!r}; register it, or ask for one that is known.")
        return tenant

    def _check_open(self) -> None:
        if self._life.closed:
            raise TenantError("The tenant store is closed; start the engine again.")

    def _add(self, name: str, source: Source) -> None:
        self._check_open()
        tenant = self._tenants.setdefault(name, Tenant(name, source))
        if tenant.source != source:
            raise TenantError(f"Tenant '{name}' is served from {tenant.source.path}; replace it, or give another name.")

    def _let_go(self, tenant: Tenant, reason: str) -> None:
        if tenant.incoming is not None:
            self._life.abandon(tenant.incoming, f"the tenant was {reason}")
        if tenant.current is not None:
            self._life.drain(tenant.current, reason)

    def _unpin(self, lease: Lease, version: Version) -> None:
        with self._lock:
            if not lease.released:
                lease.released = True
                version.pins -= 1
                version.last_used = next(self._uses)
                self._life.unpinned(version)


def _source(path: Path, planes: int | None) -> Source:
    if planes is not None and planes < 1:
        raise TenantError(f"{planes} planes of {path} cannot be served; give 1 or more, or none for all.")
    return Source(Path(path), planes)
