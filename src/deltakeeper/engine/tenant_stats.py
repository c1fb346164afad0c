"""What the tenant store says of itself: numbers for metrics and for whoever runs it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltakeeper.engine.tenant_admission import Ledger
from deltakeeper.engine.tenant_records import Delta, Stage, State, Tenant, Version


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
        unusable: whether the last load failed for what the files are, or for their size.
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
    unusable: bool = False


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


class Snapshot:
    """Copies of what is counted: taken in a microsecond a tenant while nothing changes, and counted afterwards."""

    def __init__(
        self,
        tenants: Collection[Tenant],
        live: Collection[Version],
        ledger: Ledger,
        waiting: int,
        loads: int,
        failures: Counter[str],
        evictions: Counter[str],
    ) -> None:
        self._tenants = [(t, vars(t).copy(), t.evictions and dict(t.evictions)) for t in tenants]
        self._versions = [(v.tenant, _Row(v.stage, v.delta, v.held, v.settled, v.pins)) for v in live]
        self._ledger = (ledger.budget, ledger.resident, ledger.reserved, ledger.taken)
        self._counts = (waiting, loads, dict(failures), dict(evictions))

    def stats(self, now: float) -> StoreStats:
        """Count it."""
        own: defaultdict[Tenant, list[_Row]] = defaultdict(list)
        for tenant, row in self._versions:
            own[tenant].append(row)
        budget, resident, reserved, taken = self._ledger
        waiting, loads, failures, evictions = self._counts
        return StoreStats(
            tenants={t.name: _tenant_stats(fields, gone, own[t], now) for t, fields, gone in self._tenants},
            byte_budget=budget,
            resident_bytes=resident,
            reserved_bytes=reserved,
            residents=taken,
            pins=sum(row.pins for _, row in self._versions),
            waiting=waiting,
            loads=loads,
            failures=failures,
            evictions=evictions,
        )


class _Row(NamedTuple):
    stage: Stage
    delta: Delta | None
    held: int
    settled: bool
    pins: int


def state_of(current: bool, incoming: bool, stages: Iterable[Stage], reason: str) -> State:
    """State of a tenant, given whether it has these versions, the stages of all, and why its last load failed."""
    if current:
        return "resident"
    if incoming:
        return "loading"
    if any(stage in ("draining", "leaving") for stage in stages):
        return "draining"
    return "failed" if reason else "cold"


def _tenant_stats(fields: dict[str, Any], evictions: Mapping[str, int], rows: list[_Row], now: float) -> TenantStats:
    current = None if fields["current"] is None else fields["current"].delta
    stages = [row.stage for row in rows]
    return TenantStats(
        state=state_of(fields["current"] is not None, fields["incoming"] is not None, stages, fields["reason"]),
        version=None if current is None else current.version,
        resident_bytes=sum(row.held for row in rows if row.settled),
        reserved_bytes=sum(row.held for row in rows if not row.settled),
        disk_bytes=fields["disk_bytes"],
        read_ahead=fields["read_ahead"],
        pins=sum(row.pins for row in rows),
        versions=len(rows),
        loads=fields["loads"],
        load_seconds=fields["load_seconds"],
        failures=fields["failures"],
        reason=fields["reason"],
        retry_seconds=max(0.0, fields["retry_at"] - now),
        evictions=dict(evictions),
        unusable=fields["unusable"],
    )
