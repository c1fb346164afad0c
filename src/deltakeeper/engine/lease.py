"""A lease: what a request holds so that its tenant's version stays in memory until the last token."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from deltakeeper.engine.tenant_records import Delta, Version


class Lease:
    """A pin on one version of a tenant; as a context manager it is released at the end of the block.

    Attributes:
        name: the tenant's name.
        version: identity of the content, lower-case hex; two leases of one name may differ after a swap.
        slot: the slot of that version in the overlay, 1 or more.
        delta: the delta in memory.
        record: what the store remembers of the version.
    """

    __slots__ = ("_unpin", "delta", "name", "record", "released", "slot", "version")

    def __init__(self, record: Version, delta: Delta, unpin: Callable[[Lease, Version], None]) -> None:
        self.name = record.tenant.name
        self.version = delta.version
        self.slot = record.slot
        self.delta = delta
        self.released = False
        self.record = record
        self._unpin = unpin

    def release(self) -> None:
        """Give the pin back, on any thread; what comes after the first call does nothing."""
        self._unpin(self, self.record)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
