"""What tenants' names stand for, as the ingress has it; replicas learn it from the requests that they get."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from deltakeeper.engine.tenant_files import artifact_folders, check_name
from deltakeeper.errors import TenantError
from deltakeeper.service.cluster.messages import Place


class Catalog:
    """Places by name; safe on any thread.

    Args:
        folder: whose subfolders `scan` looks through; every node has to find the same files there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._last = 0

    def names(self) -> list[str]:
        """All known names, sorted."""
        with self._lock:
            return sorted(self._places)

    def find(self, name: str) -> Place | None:
        """What a name stands for; None where it is not known."""
        with self._lock:
            return self._places.get(name)

    def place(self, name: str) -> Place:
        """The same; raises TenantError where it is not known."""
        found = self.find(name)
        if found is None:
            raise TenantError(f"There is no tenant {name[:140]!r}; register it, or ask for one that is known.")
        return found

    def register(self, name: str, path: Path, *, planes: int | None = None) -> Place:
        """Make a name known; the same again changes nothing.

        Raises:
            TenantError: the name is malformed, or stands for something else.
        """
        check_name(name)
        if planes is not None and planes < 1:
            raise TenantError(f"{planes} planes of {path} cannot be served; give 1 or more, or none for all.")
        with self._lock:
            held = self._places.get(name)
            if held is None:
                held = self._places[name] = Place(name, path.absolute(), planes, self._next())
            if (held.path, held.planes) != (path.absolute(), planes):
                raise TenantError(f"Tenant '{name}' is served from {held.path}; replace it, or give another name.")
            return held

    def turned(self, name: str, path: Path, planes: int | None) -> Place:
        """What a known name would stand for once it is turned over; `put` does that."""
        self.place(name)
        with self._lock:
            return Place(name, path.absolute(), planes, self._next())

    def put(self, place: Place) -> None:
        """Let a name stand for something from now on."""
        with self._lock:
            self._places[place.name] = place

    def remove(self, name: str) -> None:
        """Forget a name; raises TenantError where it is not known."""
        self.place(name)
        with self._lock:
            self._places.pop(name, None)

    def scan(self) -> list[str]:
        """See `TenantStore.scan`."""
        found, refused = [], None
        for path in artifact_folders(self.folder):
            try:
                check_name(path.name)
            except TenantError as error:
                refused = refused or TenantError(f"{path} is left out: {error}")
                continue
            if self.find(path.name) is None:
                self.register(path.name, path)
                found.append(path.name)
        if refused is not None:
            raise refused
        return found

    def _next(self) -> int:
        """A generation that no earlier ingress has given out either: replicas may outlive theirs."""
        self._last = max(self._last + 1, time.time_ns())
        return self._last
