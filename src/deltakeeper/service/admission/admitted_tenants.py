"""The gate between store and engine: a version that was loaded is given out once it was admitted, and not before."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any, Literal

from deltakeeper.engine.fixed_tenants import Pin
from deltakeeper.engine.lease import Lease
from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import TenantError

Say = Literal["yes", "wait", "taken"]
"""`taken`: wait too, but the lease is somebody else's to release now."""


class SharedLease:
    """A lease that several hold; the store gets it back with the last of them."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._holders, self._lock = lease, 1, threading.Lock()

    def pin(self) -> Pin:
        """One more hold on the same version.

        Raises:
            TenantError: all have let go of it.
        """
        with self._lock:
            if not self._holders:
                raise TenantError(f"The canary of '{self._lease.name}' is over; start it again.")
            self._holders += 1
        return _Share(self)

    def let_go(self) -> None:
        """One hold less."""
        with self._lock:
            self._holders -= 1
            last = not self._holders
        if last:
            self._lease.release()

    @property
    def lease(self) -> Lease:
        """What is held."""
        return self._lease


class _Share:
    def __init__(self, shared: SharedLease) -> None:
        self._shared, self._held = shared, True

    @property
    def version(self) -> str:
        return self._shared.lease.version

    @property
    def slot(self) -> int:
        return self._shared.lease.slot

    @property
    def delta(self) -> Any:
        return self._shared.lease.delta

    def release(self) -> None:
        if self._held:
            self._held = False
            self._shared.let_go()


class AdmittedTenants:
    """What the engine gets its tenants from: a store, of which only admitted versions are given out.

    While a version is on trial, requests for it wait as they do for a load. The canary alone reaches it, under a name
    that nobody can guess and no tenant may have.
    """

    def __init__(self, store: TenantStore, ask: Callable[[Lease], Say]) -> None:
        """Put a gate before a store.

        Args:
            store: where versions come from.
            ask: says of a lease whether its version may be used; quick; raises TenantError where it never may.
        """
        self._store, self._ask = store, ask
        self._canaries: dict[str, SharedLease] = {}

    def acquire(self, name: str) -> Pin | None:
        """Pin a tenant's version, or None while it is loaded or on trial.

        Raises:
            TenantError: the name is unknown, it could not be loaded, or it is refused.
        """
        if (canary := self._canaries.get(name)) is not None:
            return canary.pin()
        lease = self._store.acquire(name)
        if lease is None:
            return None
        try:
            say = self._ask(lease)
        except BaseException:
            lease.release()
            raise
        if say == "yes":
            return lease
        if say == "wait":
            lease.release()
        return None

    def poll(self) -> None:
        """As the store does."""
        self._store.poll()

    def open_canary(self, shared: SharedLease) -> str:
        """A name under which the engine may ask a version that is on trial."""
        name = f"canary:{secrets.token_hex(16)}"
        self._canaries[name] = shared
        return name

    def close_canary(self, name: str) -> None:
        """Let nobody use such a name any more; requests that run keep their hold."""
        self._canaries.pop(name, None)
