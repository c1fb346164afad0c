"""Where the engine gets its tenants from, and the simplest source: deltas that an overlay has published already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltakeeper.errors import TenantError


class Pin(Protocol):
    """A hold on one version of a tenant, from the admission of a request to its last token."""

    @property
    def version(self) -> str:
        """Digest of its content."""

    @property
    def slot(self) -> int:
        """Where the overlay keeps it, 1 or more."""

    @property
    def delta(self) -> Any:
        """The delta, for its vocabulary and its tokenizer's files."""

    def release(self) -> None:
        """Let go of it; later calls do nothing."""


class Tenants(Protocol):
    """What the engine asks of a tenant store."""

    def acquire(self, name: str) -> Pin | None:
        """Pin a tenant's current version, or None while it is loaded.

        Raises:
            TenantError: there is no such tenant, or it could not be loaded.
        """

    def poll(self) -> None:
        """Take over what has been loaded; called between passes, on the engine's thread."""


@dataclass(frozen=True)
class _FixedPin:
    version: str
    slot: int
    delta: Any

    def release(self) -> None:
        """Nothing is held: these tenants never leave."""


class FixedTenants:
    """Tenants that were published by hand and stay for as long as the engine lives."""

    def __init__(self, tenants: Mapping[str, tuple[int, Any]]) -> None:
        """Name what an overlay has published.

        Args:
            tenants: slot and delta of each tenant, as `Overlay.publish` gave and took them.
        """
        self._pins = {name: _FixedPin(delta.version, slot, delta) for name, (slot, delta) in tenants.items()}

    def acquire(self, name: str) -> _FixedPin:
        """The tenant of that name.

        Raises:
            TenantError: there is none.
        """
        pin = self._pins.get(name)
        if pin is None:
            raise TenantError(f"there is no tenant {name!r}; register it first.")
        return pin

    def poll(self) -> None:
        """Nothing changes here."""
