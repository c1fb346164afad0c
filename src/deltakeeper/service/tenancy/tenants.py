"""Tenants and their versions as they were registered, so that a service finds them again when it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select, update

from deltakeeper.engine.tenant_files import check_name
from deltakeeper.service.errors import NotFound
from deltakeeper.service.tenancy.database import State
from deltakeeper.service.tenancy.tables import TENANTS, VERSIONS


@dataclass(frozen=True)
class TenantRecord:
    """One version of a tenant.

    Attributes:
        name: what requests call it.
        folder: of its artifact, relative to the folder of deltas.
        planes: sign planes that are served; None for all.
        manifest_sha256: of the artifact; None if it was not read.
        since: seconds since 1970.
        until: when it was replaced or removed; None for what is now.
    """

    name: str
    folder: str
    planes: int | None = None
    manifest_sha256: str | None = None
    since: int = 0
    until: int | None = None


class TenantRegister:
    """The tenants in a state.

    Args:
        state: where they are kept.
        now: seconds since 1970.
    """

    def __init__(self, state: State, now: Callable[[], float] = time.time) -> None:
        self._state = state
        self._now = now

    def record(
        self, name: str, folder: str, *, planes: int | None = None, manifest_sha256: str | None = None
    ) -> TenantRecord:
        """Note what a name stands for from now on; what it stood for before becomes history. The same changes nothing.

        Raises:
            TenantError: the name is malformed.
            StateError: the state cannot be written.
        """
        new = TenantRecord(check_name(name), folder, planes, manifest_sha256, int(self._now()))
        values = asdict(new)
        del values["until"]
        with self._state.writing() as connection:
            row = connection.execute(select(TENANTS).where(TENANTS.c.name == name)).mappings().one_or_none()
            if row is not None:
                old = TenantRecord(**row)
                if (old.folder, old.planes, old.manifest_sha256) == (folder, planes, manifest_sha256):
                    return old
                self._end(connection, name)
            connection.execute(insert(TENANTS).values(**values))
            del values["name"]
            connection.execute(insert(VERSIONS).values(tenant=name, **values))
        return new

    def forget(self, name: str) -> None:
        """Note that a name stands for nothing any more; raises `NotFound` if it did not."""
        with self._state.writing() as connection:
            if not self._end(connection, name):
                raise NotFound(f"No tenant {name[:140]!r} is registered.", param="id")

    def all(self) -> list[TenantRecord]:
        """What is registered now, by name."""
        with self._state.reading() as connection:
            rows = connection.execute(select(TENANTS).order_by(TENANTS.c.name)).mappings()
            return [TenantRecord(**row) for row in rows]

    def versions(self, name: str) -> list[TenantRecord]:
        """All that a name ever stood for, oldest first."""
        with self._state.reading() as connection:
            query = select(VERSIONS).where(VERSIONS.c.tenant == name).order_by(VERSIONS.c.id)
            found = [dict(row) for row in connection.execute(query).mappings()]
        return [
            TenantRecord(
                row["tenant"], row["folder"], row["planes"], row["manifest_sha256"], row["since"], row["until"]
            )
            for row in found
        ]

    def _end(self, connection: Connection, name: str) -> bool:
        open_ = (VERSIONS.c.tenant == name) & VERSIONS.c.until.is_(None)
        connection.execute(update(VERSIONS).where(open_).values(until=int(self._now())))
        return bool(connection.execute(delete(TENANTS).where(TENANTS.c.name == name)).rowcount)
