"""The life of a version: opened, let in, read, published, drained, freed; and what happens when any of it fails."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Lock

from deltakeeper.engine.tenant_admission import Ledger, plan_admission
from deltakeeper.engine.tenant_files import open_checked, payload_bytes
from deltakeeper.engine.tenant_jobs import FREE, LOAD, JobQueue
from deltakeeper.engine.tenant_records import Delta, Source, StoreSettings, Tenant, TenantOverlay, Version
from deltakeeper.errors import DeltakeeperError, OverlayError, OversizedError, TenantError, is_lasting

POLL_SECONDS = 5e-4
"""Time after which `poll` begins nothing more."""

Outcome = str | DeltakeeperError


class Lifecycle:
    """Versions of all tenants that are alive, under one lock that nobody holds while files are read.

    A method with `held` in its docstring is called with `lock` held, the others without.

    Attributes:
        lock: guards everything here and the records of tenants and versions.
        live: versions that may hold bytes.
        waiting: versions that wait for room, first come first, loaded ones that need more in front.
        wake: called on a loader thread when there is something for `poll` to do.
    """

    def __init__(self, overlay: TenantOverlay, settings: StoreSettings, clock: Callable[[], float]) -> None:
        self.lock = Lock()
        self.live: set[Version] = set()
        self.waiting: deque[Version] = deque()
        self.ledger = Ledger(settings.byte_budget, settings.max_resident)
        self.jobs = JobQueue(settings.loaders)
        self.wake: Callable[[], None] | None = None
        self.closed = False
        self.loads = 0
        self.failures: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        self._overlay = overlay
        self._settings = settings
        self._clock = clock
        self._polling = Lock()
        self._ready: deque[Version] = deque()
        self._retirable: deque[Version] = deque()
        self._outcomes: deque[tuple[Future[str], Outcome]] = deque()
        self._due = False
        self._look_again = math.inf

    def begin(self, tenant: Tenant, source: Source, *, staged: bool = False) -> Version:
        """Start a load, of a version that its name is turned over to at its end unless it is staged (held)."""
        version = Version(tenant, source, staged)
        version.done.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it for the others
        if not staged:
            tenant.incoming = version
        self.live.add(version)
        self.jobs.put(LOAD, partial(self._open, version))
        return version

    def abandon(self, version: Version, why: str) -> None:
        """Give up a load, wherever it is (held)."""
        version.abandoned = True
        if version.tenant.incoming is version:
            version.tenant.incoming = None
        self._outcomes.append((version.done, TenantError(f"The load of '{version.tenant.name}' ended early: {why}.")))
        if version.artifact is not None:
            version.artifact.cancelled = True
        if version.stage == "waiting":
            self.waiting.remove(version)
            self._dispose(version)
        elif version.stage == "ready":
            self._ready.remove(version)
            self._dispose(version)

    def turn_over(self, version: Version) -> None:
        """Give a published version to new requests from now on, in place of the one before (held)."""
        tenant, old = version.tenant, version.tenant.current
        tenant.current, tenant.source = version, version.source
        tenant.reason, tenant.failed_in_a_row, tenant.retry_at, tenant.read_ahead = "", 0, 0.0, False
        tenant.unusable = False
        if old is not None:
            self.drain(old, "replaced")

    def drain(self, version: Version, reason: str) -> None:
        """Let no new request have a published version, and free it with its last pin (held)."""
        if version.tenant.current is version:
            version.tenant.current = None
        version.stage = "draining"
        version.tenant.evictions[reason] += 1
        self.evictions[reason] += 1
        if not version.pins:
            self._retirable.append(version)
        self._due = True

    def unpinned(self, version: Version) -> None:
        """A pin was given back (held)."""
        if not version.pins:
            if version.stage == "draining":
                self._retirable.append(version)
                self._due = True
            elif self.waiting:
                self._due = True

    def poll(self) -> None:
        """Publish what is loaded and retire what has to go, for about `POLL_SECONDS`."""
        if not self.jobs.threads:
            self.jobs.run_one()
        if not self._due and self._clock() < self._look_again:
            return
        with self._polling:
            end = time.perf_counter() + POLL_SECONDS
            with self.lock:
                self._due = False
                self._admit()
            busy = True
            while busy:
                published, retired = self._publish_next(), self._retire_next()
                busy = (published or retired) and time.perf_counter() < end
            with self.lock:
                self._due = self._due or bool(self._ready or self._retirable)
        self.announce()

    def announce(self) -> None:
        """Tell those who wait for a load how it ended; without the lock, since they may call the store."""
        while True:
            try:
                future, outcome = self._outcomes.popleft()
            except IndexError:
                return
            if isinstance(outcome, str):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def close(self) -> None:
        """End the loader threads and free every version, pinned or not."""
        with self.lock:
            self.closed = True
            for version in list(self.live):
                if version.coming and not version.abandoned:
                    self.abandon(version, "the tenant store was closed")
        self.jobs.stop()
        with self._polling, self.lock:
            for version in list(self.live):
                if version.stage == "published":
                    self.drain(version, "closed")
                if version.stage == "draining":
                    with suppress(OverlayError):  # an overlay that was detached has retired it
                        self._overlay.retire(version.slot)
                if version.delta is not None:
                    version.delta.close()
                self._end(version)
            self._ready.clear()
            self._retirable.clear()
        self.announce()

    # Loader threads

    def _open(self, version: Version) -> None:
        """Read the headers, and queue for room."""
        source, began = version.source, self._clock()
        try:
            artifact = open_checked(source.path, self._settings.base_root)
            artifact.tenant = version.tenant.name
            size = payload_bytes(artifact, source.planes)
        except Exception as error:
            self._fail(version, error)
            return
        with self.lock:
            version.artifact, version.payload_bytes = artifact, size
            version.seconds = self._clock() - began
            tenant = version.tenant
            tenant.disk_bytes = sum(record.stored_bytes for record in artifact.manifest.tensors.values())
            known = tenant.learned
            version.wanted = known[2] if known is not None and known[:2] == (source, size) else size
            if fits := version.wanted <= self.ledger.budget:
                if version.abandoned:
                    self._dispose(version)
                else:
                    version.stage = "waiting"
                    self.waiting.append(version)
                    self._admit()
        if not fits:
            self._fail(version, self._too_large(version))
        self._told()

    def _read(self, version: Version) -> None:
        """Read the tensors, for which room is reserved."""
        began, artifact = self._clock(), version.artifact
        try:
            assert artifact is not None
            delta = _run_apart(partial(self._overlay.load, artifact, planes=version.source.planes))
        except Exception as error:
            self._fail(version, error)
            return
        with self.lock:
            version.delta = delta
            version.seconds += self._clock() - began
            version.tenant.learned = (version.source, version.payload_bytes, delta.nbytes)
            version.wanted = delta.nbytes
            fits = version.wanted <= self.ledger.budget
            if version.abandoned:
                self._dispose(version)
            elif version.wanted <= version.held:
                self._loaded(version)
                self._admit()
            elif fits:
                version.stage = "waiting"
                self.waiting.appendleft(version)
                self._admit()
        if not fits and not version.abandoned:
            self._fail(version, self._too_large(version))
        self._told()

    def _free(self, version: Version) -> None:
        """Give memory back, and then the bytes."""
        try:
            if version.delta is not None:
                version.delta.close()
        finally:
            with self.lock:
                self._end(version)
                self._admit()
            self._told()

    def _fail(self, version: Version, error: Exception) -> None:
        """Free what a load held and say why it failed; a name that still has a version to serve goes on with that."""
        told = _sentence(version, error)
        with self.lock:
            tenant = version.tenant
            if not version.abandoned:
                self.failures[type(told).__name__] += 1
                tenant.failures += 1
                if tenant.incoming is version:
                    tenant.incoming = None
                if version.source == tenant.source and not version.staged:
                    tenant.reason = str(told)
                    tenant.unusable = is_lasting(told)
                    delay = self._settings.backoff_seconds * 2.0 ** min(tenant.failed_in_a_row, 60)
                    tenant.retry_at = self._clock() + min(delay, self._settings.backoff_limit)
                    tenant.failed_in_a_row += 1
                self._outcomes.append((version.done, told))
            self._dispose(version)
            self._admit()
        self._told()

    def _told(self) -> None:
        self.announce()
        wake = self.wake
        if wake is not None and self._due:
            wake()

    # With the lock held

    def _admit(self) -> None:
        """Let in who fits, and see to it that room is made for who may."""
        self._look_again = math.inf
        if not self.waiting or self.closed:
            return
        plan = plan_admission(self.waiting, self.live, self.ledger, self._clock())
        self._look_again = plan.look_again
        for version in plan.evicted:
            self.drain(version, "room")
        for version in plan.drained:
            self.drain(version, "replaced")
        for version in plan.dropped:
            self._put_down(version)
        for version in plan.granted:
            self.waiting.remove(version)
            self.ledger.reserve(version)
            if version.delta is None:
                version.stage = "reading"
                self.jobs.put(LOAD, partial(self._read, version))
            else:
                self._loaded(version)

    def _loaded(self, version: Version) -> None:
        assert version.delta is not None
        self.ledger.settle(version, version.delta.nbytes)
        version.stage, version.artifact = "ready", None
        self._ready.append(version)
        self._due = True

    def _put_down(self, version: Version) -> None:
        """Free the memory and the room of a loaded version, which goes on waiting to be read again."""
        bygone = Version(version.tenant, version.source, delta=version.delta, held=version.held, placed=version.placed)
        version.delta, version.held, version.placed = None, 0, False
        self.live.add(bygone)
        self._dispose(bygone)

    def _dispose(self, version: Version) -> None:
        """End a version that is in no slot: at once, or once a loader has given its memory back."""
        if version.delta is None:
            self._end(version)
            self._due = self._due or bool(self.waiting)
        else:
            version.stage = "leaving"
            self.jobs.put(FREE, partial(self._free, version))

    def _end(self, version: Version) -> None:
        self.ledger.release(version)
        self.live.discard(version)
        version.stage, version.delta, version.artifact = "gone", None, None

    def _too_large(self, version: Version) -> OversizedError:
        return OversizedError(
            f"{version.source.path} needs {version.wanted:,} bytes and the budget of all tenants is "
            f"{self.ledger.budget:,}; raise the budget, serve fewer planes, or compress it further."
        )

    # The engine's thread

    def _publish_next(self) -> bool:
        with self.lock:
            if not self._ready or self.closed:
                return False
            version = self._ready.popleft()
            version.stage = "publishing"
        try:
            slot = self._overlay.publish(version.delta)
        except Exception as error:
            self._fail(version, error)
            return True
        with self.lock:
            version.slot = slot
            if version.abandoned:
                self.drain(version, "unloaded")
                return True
            tenant = version.tenant
            version.stage = "published"
            version.fresh_until = self._clock() + self._settings.grace_seconds
            tenant.load_seconds = version.seconds
            tenant.loads += 1
            self.loads += 1
            if version.staged:
                version.pins += 1
            else:
                tenant.incoming = None
                self.turn_over(version)
            assert version.delta is not None
            self._outcomes.append((version.done, version.delta.version))
            self._admit()
        return True

    def _retire_next(self) -> bool:
        with self.lock:
            if not self._retirable or self.closed:
                return False
            version = self._retirable.popleft()
            version.stage = "leaving"
        self._overlay.retire(version.slot)
        with self.lock:
            version.slot = 0
            self._dispose(version)
        return True


def _run_apart(load: Callable[[], Delta]) -> Delta:
    """Run a load on a thread of its own.

    Terms that one thread holds in a row lie in the same large pages (`kernels/csrc/arena.hpp`), which go back to the
    system with the last of them: a tenant that stays would keep those of tenants that came before and after it.
    """
    with ThreadPoolExecutor(1, "tenant-load") as thread:
        return thread.submit(load).result()


def _sentence(version: Version, error: Exception) -> DeltakeeperError:
    """An error to keep and to hand on, without the frames (and the tensors in them) that it came through."""
    if isinstance(error, DeltakeeperError):
        return type(error)(str(error))
    return TenantError(
        f"{version.source.path} could not be loaded ({type(error).__name__}: {error}); check the artifact and the disk."
    )
