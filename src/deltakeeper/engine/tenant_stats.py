"""What the tenant store says of itself: numbers for metrics and for whoever runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deltakeeper.engine.tenant_admission import Ledger
from deltakeeper.engine.tenant_records import State, Tenant, Version


@dataclass(frozen=True)
class TenantStats:
    """One tenant.

    Attributes:
        state: `resident` if new requests are served at once, else what its name waits for.
        version: identity of the content that new requests get, None unless resident.
        resident_bytes: bytes in memory, of all its versions.
        reserved_bytes: bytes held for loads in progress.
        disk_bytes: payload bytes of the last artifact that was opened; 0 before.
        read_ahead: whether its files were asked into the page cache since it was last loaded.
        pins: leases in use, of all its versions.
        versions: versions in memory or on their way.
        loads: loads that were published.
        load_seconds: how long the last of them took to read, headers and tensors, without waiting for room.
        failures: loads that failed.
        reason: why the last one failed, empty after one that did not.
        retry_seconds: how long it is refused from now on for that.
        evictions: versions that left memory, by reason: room, replaced, unloaded, removed, closed.
    """

    state: State
    version: str | None
    resident_bytes: int
    reserved_bytes: int
    disk_bytes: int
    read_ahead: bool
    pins: int
    versions: int
    loads: int
    load_seconds: float
    failures: int
    reason: str
    retry_seconds: float
    evictions: dict[str, int]


@dataclass(frozen=True)
class StoreStats:
    """The whole store; bytes are of all versions, those of removed tenants too.

    Attributes:
        tenants: by name.
        byte_budget: bytes that resident and reserved ones never pass together.
        resident_bytes: bytes of deltas in memory.
        reserved_bytes: bytes held for loads in progress.
        residents: versions that take a place: in memory, or let in to load.
        pins: leases in use.
        waiting: loads that wait for room.
        loads: loads that were published.
        failures: loads that failed, by the class of the error.
        evictions: versions that left memory, by reason.
    """

    tenants: dict[str, TenantStats]
    byte_budget: int
    resident_bytes: int
    reserved_bytes: int
    residents: int
    pins: int
    waiting: int
    loads: int
    failures: dict[str, int]
    evictions: dict[str, int]


def state_of(tenant: Tenant, versions: Iterable[Version]) -> State:
    """State of a tenant, given the versions of it that are alive."""
    if tenant.current is not None:
        return "resident"
    if tenant.incoming is not None:
        return "loading"
    if any(v.stage in ("draining", "leaving") for v in versions):
        return "draining"
    return "failed" if tenant.reason else "cold"


def store_stats(
    tenants: Collection[Tenant],
    live: Collection[Version],
    ledger: Ledger,
    waiting: int,
    loads: int,
    failures: Counter[str],
    evictions: Counter[str],
    now: float,
) -> StoreStats:
    """Count everything; the caller sees to it that nothing changes meanwhile."""
    own: dict[Tenant, list[Version]] = {tenant: [] for tenant in tenants}
    for version in live:
        own.setdefault(version.tenant, []).append(version)
    return StoreStats(
        tenants={tenant.name: _tenant_stats(tenant, own[tenant], now) for tenant in tenants},
        byte_budget=ledger.budget,
        resident_bytes=ledger.resident,
        reserved_bytes=ledger.reserved,
        residents=ledger.taken,
        pins=sum(v.pins for v in live),
        waiting=waiting,
        loads=loads,
        failures=dict(failures),
        evictions=dict(evictions),
    )


def _tenant_stats(tenant: Tenant, versions: list[Version], now: float) -> TenantStats:
    current = tenant.current
    return TenantStats(
        state=state_of(tenant, versions),
        version=None if current is None or current.delta is None else current.delta.version,
        resident_bytes=sum(v.held for v in versions if v.settled),
        reserved_bytes=sum(v.held for v in versions if not v.settled),
        disk_bytes=tenant.disk_bytes,
        read_ahead=tenant.read_ahead,
        pins=sum(v.pins for v in versions),
        versions=len(versions),
        loads=tenant.loads,
        load_seconds=tenant.load_seconds,
        failures=tenant.failures,
        reason=tenant.reason,
        retry_seconds=max(0.0, tenant.retry_at - now),
        evictions=dict(tenant.evictions),
    )
