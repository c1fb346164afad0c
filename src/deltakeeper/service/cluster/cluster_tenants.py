"""Tenants at the ingress of a cluster: names are here, and each is loaded where its requests go."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deltakeeper.engine.tenant_records import Source, State
from deltakeeper.engine.tenant_stats import StoreStats
from deltakeeper.errors import TenantError
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.failures import ReplicaLostError, error_of
from deltakeeper.service.cluster.messages import Failure, Loaded, Place, Told
from deltakeeper.service.cluster.shared_work import share
from deltakeeper.service.cluster.totals import store_totals, tenant_totals
from deltakeeper.service.cluster.watch import Watch


@dataclass(frozen=True)
class KnownDelta:
    """What a delta in a replica's memory is for whoever makes prompts for it.

    Attributes:
        vocabulary: tokens that it knows.
        side_folder: its artifact, which the ingress reads too.
        side_files: those of its own in it, each with the SHA-256 that it had when a replica loaded it.
    """

    vocabulary: int
    side_folder: Path
    side_files: dict[str, str]


@dataclass(frozen=True)
class KnownVersion:
    """A version that a replica has loaded. Nothing is held with it: a request that comes later loads it again."""

    version: str
    delta: KnownDelta

    def __enter__(self) -> KnownVersion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClusterTenants:
    """Implements `serving_port.TenantPlaces` over replicas.

    Args:
        watch: the thread that speaks with them, and what it heard.
        catalog: what names stand for.
        tries: how often a load is asked for at most, while replicas are lost.
        delta_bytes: memory of all deltas of one replica.
        listen: told of decisions that come with loads.
    """

    def __init__(
        self,
        watch: Watch,
        catalog: Catalog,
        *,
        tries: int,
        delta_bytes: int,
        listen: Callable[[Told], None] = lambda told: None,
    ) -> None:
        self._watch, self._catalog, self._tries, self._listen = watch, catalog, tries, listen
        self._delta_bytes = delta_bytes
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Place, KnownVersion]] = {}
        self._loading: dict[Place, Future[str]] = {}

    @property
    def max_delta_bytes(self) -> int:
        """Most bytes of one delta: the budget of a replica, whichever has to hold it."""
        return self._delta_bytes

    def names(self) -> list[str]:
        """All known names, sorted."""
        return self._catalog.names()

    def state(self, name: str) -> State:
        """State of a tenant, on the replica where it is best off; raises TenantError for an unknown one."""
        self._catalog.place(name)
        return tenant_totals(name, self._watch.live()).state

    def source(self, name: str) -> Source:
        """What the next load of a tenant reads; raises TenantError for an unknown one."""
        place = self._catalog.place(name)
        return Source(place.path, place.planes)

    def stats(self) -> StoreStats:
        """Counts of all replicas, as they last reported."""
        return store_totals(self._catalog.names(), self._watch.live(), self._watch.gone())

    def acquire(self, name: str) -> KnownVersion | None:
        """The version that a replica has loaded for what the name stands for now; None where none has yet.

        Raises:
            TenantError: the name is unknown.
        """
        place = self._catalog.place(name)
        with self._lock:
            known = self._known.get(name)
        return known[1] if known is not None and known[0] == place else None

    def load(self, name: str) -> Future[str]:
        """Have a tenant loaded by the replica that its requests go to; the future gives its version.

        The future raises what the load failed with there (ArtifactError, OverlayError, TenantError, Refused), and
        TenantError where every replica that was asked was lost. It cannot be cancelled.

        Raises:
            TenantError: the name is unknown.
        """
        return share(self._load(self._catalog.place(name)))  # all who ask for the model wait for the same load

    def register(self, name: str, path: Path, *, planes: int | None = None) -> None:
        """See `Catalog.register`."""
        self._catalog.register(name, path, planes=planes)

    def scan(self) -> list[str]:
        """See `TenantStore.scan`."""
        return self._catalog.scan()

    def replace(self, name: str, path: Path, *, planes: int | None = None) -> Future[str]:
        """Have another artifact loaded, and turn the name over to it then; until then, and if it fails, the old serves.

        Raises:
            TenantError: the name is unknown.
        """
        return self._load(self._catalog.turned(name, path, planes))

    def unload(self, name: str) -> None:
        """Free a tenant's memory on all replicas; the next request loads it again.

        Raises:
            TenantError: the name is unknown.
        """
        self._catalog.place(name)
        self._forget(name)
        self._watch.run(self._everywhere(self._watch.replicas.unload(name)))

    def remove(self, name: str) -> None:
        """Forget a name; raises TenantError where it is not known."""
        self._catalog.remove(name)
        self._forget(name)
        self._watch.run(self._everywhere(self._watch.replicas.remove(name)))

    async def _everywhere(self, work: Awaitable[None]) -> None:
        await work
        await self._watch.refresh()

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)

    def _load(self, place: Place) -> Future[str]:
        with self._lock:
            held = self._loading.get(place)
            if held is not None:
                return held
            begun = self._loading[place] = self._watch.run(self._loaded(place))
        begun.add_done_callback(lambda done: self._end(place))  # at once if it has ended, and then it wants the lock
        return begun

    def _end(self, place: Place) -> None:
        with self._lock:
            self._loading.pop(place, None)

    async def _loaded(self, place: Place) -> str:
        loaded = await self._ask(place)
        delta = KnownDelta(loaded.vocabulary, place.path, loaded.side_files)
        held = self._catalog.find(place.name)
        if held is None:
            raise TenantError(f"Tenant '{place.name}' was removed while it was loaded.")
        if held.generation <= place.generation:
            self._catalog.put(place)
            with self._lock:
                self._known[place.name] = (place, KnownVersion(loaded.version, delta))
        return loaded.version

    async def _ask(self, place: Place) -> Loaded:
        for left in reversed(range(self._tries)):
            try:
                answer = await self._watch.replicas.load(place)
            except ReplicaLostError as error:
                if left:
                    continue
                raise TenantError(f"Tenant '{place.name}' could not be loaded: {error}") from error
            if answer.told is not None:
                self._listen(answer.told)
            if isinstance(answer, Failure):
                raise error_of(answer)
            return answer
        raise AssertionError("there is at least one try")
