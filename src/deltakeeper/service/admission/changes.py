"""What changes the tenants of a running service: each change happens whole, or leaves everything as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine.tenant_files import check_name, open_checked, payload_bytes
from deltakeeper.errors import ArtifactError, DeltakeeperError, OversizedError, TenantError, is_lasting
from deltakeeper.service.admission.placing import find_artifact, link, remove
from deltakeeper.service.errors import BadRequest, Conflict, NotFound, Refused, ServiceError, TooLarge, Unavailable
from deltakeeper.service.running import Services
from deltakeeper.service.tenants import may_be_found

_SETTLE_SECONDS = 600.0
"""How long a load with its canary may take before the change is taken back."""
_lock = threading.Lock()
_changing: set[tuple[Path, str]] = set()


class Register(Protocol):
    """Notes what names stand for, beyond the folder of the deltas."""

    def record(self, name: str, folder: str, *, planes: int | None, manifest_sha256: str | None) -> Any:
        """Note what a name stands for from now on."""

    def forget(self, name: str) -> None:
        """Note that it stands for nothing; raises `NotFound` if it did not."""


@dataclass(frozen=True)
class Change:
    """What an administrator wants a name to stand for.

    Attributes:
        name: of the tenant.
        path: subfolder of the deltas that holds the artifact.
        planes: sign planes to serve, None for all; policy may allow fewer.
        replace: whether the name may stand for something else already.
        load: whether to load it, and see it through its canary, before this is answered.
    """

    name: str
    path: str
    planes: int | None = None
    replace: bool = False
    load: bool = True


def apply_change(services: Services, change: Change) -> bool:
    """Let a name stand for an artifact; whether the name is new. It waits for the load.

    Where a name is turned over, running answers keep the version that they have, and new requests get that one too
    until the new one has passed its canary.

    Raises:
        BadRequest: the name is malformed.
        NotFound: there is no such artifact among the deltas.
        Conflict: the name stands for something else, or is being changed already.
        TooLarge: the delta could never be in memory.
        Refused: its files, policy or its canary keep it out.
        Unavailable: there is no room now, or it took too long.
    """
    name = checked_name(services, change.name)
    artifact = find_artifact(services.deltas, change.path)
    with alone(services, name, artifact.name):
        known = name in services.store.names()
        place = services.deltas / name
        if place.exists() and place.resolve() != artifact and not change.replace:
            raise Conflict(f"The name '{name}' stands for another artifact; give another name, or replace it.")
        if services.admission is not None:
            decision = services.admission.decide(name, artifact)
            if decision.verdict == "refused":
                raise Refused(" ".join(decision.reasons), code="not_admitted")
        opened = _check_headers(services, artifact, change.planes)  # after policy, which logs what it refuses
        undo = _undo(services, change, known)
        try:
            if known and change.replace:
                _turn_over(services, name, artifact, change.planes)  # before the link, which a restart goes by
            undo = _after(link(services.deltas, name, artifact), undo)
            if not (known and change.replace):
                _enter(services, change, name, place, known)
            if change.load:
                _settle(services, name)
            if (register := _register(services)) is not None:
                planes = services.store.source(name).planes
                register.record(name, name, planes=planes, manifest_sha256=opened.manifest_sha256)
        except BaseException:
            undo()
            raise
        services.notes.put_away.discard(name)
    return not known


def forget(services: Services, name: str) -> None:
    """Serve a name no more; running answers go on to their end, and the artifact is kept among the removed ones.

    Raises:
        NotFound: there is no such tenant.
        Conflict: other names stand for its artifact, or it is being changed.
        Unavailable: the state cannot be written; nothing has changed then.
    """
    checked_name(services, name)
    with alone(services, name):
        known = name in services.store.names()
        if not known and not (services.deltas / name).exists():
            raise NotFound(f"There is no delta {name!r}.", code="delta_not_found")
        put_back = remove(services.deltas, name)
        try:
            if (register := _register(services)) is not None:
                with suppress(NotFound):
                    register.forget(name)
        except BaseException:
            put_back()
            raise
        services.notes.put_away.discard(name)
        if known:
            services.store.remove(name)


def put_away(services: Services, name: str) -> None:
    """Serve a name no more until it is loaded again; its artifact stays where it is.

    A name that is a link was given to the artifact by a load, so the link goes. A folder would make its name known,
    or known again, when somebody asks for it, so it is noted that it may not, until the service starts anew.

    Raises:
        NotFound: there is no such tenant.
        Conflict: it is being changed.
    """
    if name not in services.store.names() and not may_be_found(services, name):
        raise NotFound(f"There is no delta {name[:140]!r}.", code="delta_not_found")
    if (services.deltas / name).is_symlink():
        forget(services, name)
        return
    with alone(services, name):
        services.notes.put_away.add(name)
        if name in services.store.names():
            services.store.remove(name)


@contextmanager
def alone(services: Services, *names: str) -> Iterator[None]:
    """Nobody else changes these names meanwhile: who comes second is told so, and holds no thread for minutes."""
    wanted = {(services.deltas, name) for name in names}
    with _lock:
        if taken := sorted(name for _, name in wanted & _changing):
            raise Conflict(f"'{taken[0]}' is being changed by another request; ask again when that has ended.")
        _changing.update(wanted)
    try:
        yield
    finally:
        with _lock:
            _changing.difference_update(wanted)


def _register(services: Services) -> Register | None:
    """Where a service that keeps state notes its tenants, so that planes too are there when it starts again."""
    found: Register | None = getattr(services.gate, "tenants", None)
    return found


def checked_name(services: Services, name: str) -> str:
    """A name that a tenant may have; raises `BadRequest` for another and `Conflict` for the base's."""
    try:
        check_name(name)
    except TenantError as error:
        raise BadRequest(str(error), param="name") from error
    if name == services.base_name:
        raise Conflict(f"'{name}' is the name of the base; give another.")
    return name


def _check_headers(services: Services, artifact: Path, planes: int | None) -> DeltaArtifact:
    try:
        opened = open_checked(artifact, services.base.root)
        nbytes = payload_bytes(opened, planes)
    except ArtifactError as error:
        raise _meaning(error) from error
    most = services.store.max_delta_bytes
    if nbytes > most:
        raise TooLarge(f"The delta needs {nbytes:,} bytes, and there is room for {most:,} where it would be held.")
    return opened


def _enter(services: Services, change: Change, name: str, place: Path, known: bool) -> None:
    """Tell the store of a name that it may know already."""
    if known:
        source = services.store.source(name)
        if change.planes is None or (change.planes == source.planes and place.resolve() == source.path.resolve()):
            return
    try:
        services.store.register(name, place, planes=change.planes)
    except TenantError as error:
        raise Conflict(f"{error}", code="already_registered") from error


def _turn_over(services: Services, name: str, artifact: Path, planes: int | None) -> None:
    """Let a known name stand for an artifact, once that is loaded and has passed its canary."""
    replace = services.store.replace if services.admission is None else services.admission.replace

    def turned() -> str:
        future = replace(name, artifact, planes=planes)
        try:
            return future.result(_SETTLE_SECONDS)
        except TimeoutError:
            if services.admission is None or future.cancel():
                raise
            return future.result(_SETTLE_SECONDS)  # it is being turned over at this moment

    _wait(turned)


def _settle(services: Services, name: str) -> None:
    if services.admission is None:
        _wait(lambda: services.store.load(name).result(_SETTLE_SECONDS))
        return
    try:
        decision = services.admission.settle(name, _SETTLE_SECONDS)
    except OversizedError as error:
        raise _meaning(error) from error
    if decision.verdict == "refused":
        raise Refused(" ".join(decision.reasons), code="not_admitted")


def _wait(load: Callable[[], str]) -> None:
    try:
        load()
    except TimeoutError as error:
        raise Unavailable("The delta was not loaded in time; ask again later.", retry_after=30.0) from error
    except ServiceError:
        raise
    except DeltakeeperError as error:
        raise _meaning(error) from error


def _meaning(error: DeltakeeperError) -> ServiceError:
    """What it means to whoever wants a delta that it could not be loaded."""
    if isinstance(error, OversizedError):
        return TooLarge(str(error))
    if is_lasting(error):
        return Refused(str(error), code="artifact_refused")
    return Unavailable(str(error), retry_after=5.0)


def _after(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        with suppress(OSError):
            first()
        then()

    return both


def _undo(services: Services, change: Change, known: bool) -> Callable[[], None]:
    """What puts the store back to how it is now."""
    store, name = services.store, change.name
    before = store.source(name) if known else None

    def undo() -> None:
        with suppress(DeltakeeperError, TimeoutError):
            if before is None:
                store.remove(name)
            elif change.replace and (services.admission is None or store.source(name) != before):
                store.replace(name, before.path, planes=before.planes).result(_SETTLE_SECONDS)
                if services.admission is not None:  # which remembers that it let this one in
                    services.admission.settle(name, _SETTLE_SECONDS)

    return undo
